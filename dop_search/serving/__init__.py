"""Serve strategies with vLLM: a plug-in that patches nothing of it. See the README of this folder."""

from __future__ import annotations

from dop_search.serving.servable import ARCHITECTURE

__all__ = ["register"]


def register() -> None:
    """Make the pruned model class known to vLLM; its entry point ``vllm.general_plugins``."""
    from vllm import ModelRegistry

    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, f"dop_search.serving.llava:{ARCHITECTURE}")
