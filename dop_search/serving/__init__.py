"""Serve strategies with vLLM: a plug-in that patches nothing of it. See the README of this folder."""

from __future__ import annotations

from dop_search.serving.servable import ARCHITECTURES

__all__ = ["register"]


def register() -> None:
    """Make the pruned model classes known to vLLM; its entry point ``vllm.general_plugins``."""
    from vllm import ModelRegistry

    known = ModelRegistry.get_supported_archs()
    for family, name in ARCHITECTURES.items():
        if name not in known:
            module = "qwen2_5_vl" if family == "qwen2_5_vl" else "llava"
            ModelRegistry.register_model(name, f"dop_search.serving.{module}:{name}")
