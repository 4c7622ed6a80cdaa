"""From a model instance to its adapter, without importing the families that are not used."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedModel

from dop_search.models.adapter import ModelAdapter
from dop_search.utils.errors import UnsupportedModelError
from dop_search.utils.registry import Registry, did_you_mean

FAMILIES = Registry(
    "model type",
    {
        "llava": "dop_search.models.llava:LlavaAdapter",
        "llava_next": "dop_search.models.llava_next:LlavaNextAdapter",
        "llava_onevision": "dop_search.models.llava_next:LlavaOnevisionAdapter",
        "qwen2_vl": "dop_search.models.qwen2_vl:Qwen2VLAdapter",
        "qwen2_5_vl": "dop_search.models.qwen2_5_vl:Qwen2_5VLAdapter",
        **dict.fromkeys(("qwen3_vl", "cosmos3_omni"), "dop_search.models.qwen3:Qwen3VLAdapter"),
        "qwen3_5": "dop_search.models.qwen3:Qwen3_5Adapter",
        "qwen3_5_moe": "dop_search.models.qwen3:Qwen3_5MoeAdapter",
        "internvl": "dop_search.models.tiles:InternVLAdapter",
        "qwen3_vl_moe": "dop_search.models.qwen3:Qwen3VLMoeAdapter",
        "idefics3": "dop_search.models.idefics3:Idefics3Adapter",
        "smolvlm": "dop_search.models.idefics3:Idefics3Adapter",
        "mistral3": "dop_search.models.mistral3:Mistral3Adapter",
        "lighton_ocr": "dop_search.models.mistral3:LightOnOcrAdapter",
        "ovis2": "dop_search.models.tiles:Ovis2Adapter",
        "gemma4": "dop_search.models.gemma4:Gemma4Adapter",
        "gemma3": "dop_search.models.gemma3:Gemma3Adapter",
        "qianfan_ocr": "dop_search.models.tiles:QianfanOcrAdapter",
        "video_llava": "dop_search.models.llava:VideoLlavaAdapter",
        "video_llama_3": "dop_search.models.video_llama_3:VideoLlama3Adapter",
        **dict.fromkeys(("deepseek_vl", "deepseek_vl_hybrid", "janus"), "dop_search.models.tiles:DeepseekVLAdapter"),
        "fast_vlm": "dop_search.models.closed_towers:FastVlmAdapter",
        "perception_lm": "dop_search.models.closed_towers:PerceptionLMAdapter",
        "aria": "dop_search.models.closed_towers:AriaAdapter",
        "vipllava": "dop_search.models.llava:VipLlavaAdapter",
        "llava_next_video": "dop_search.models.llava_next:LlavaNextVideoAdapter",
        **dict.fromkeys(("minicpmv4_6", "minicpmv4_7", "minicpm_ocr"), "dop_search.models.minicpmv:MiniCPMVAdapter"),
        "lfm2_vl": "dop_search.models.lfm2_vl:Lfm2VlAdapter",
        **dict.fromkeys(("glm4v", "glm46v", "glmga", "glm_ocr"), "dop_search.models.qwen2_vl:Glm4vAdapter"),
    },
    UnsupportedModelError,
)
"""``model_type`` of the configuration → adapter class. An entry needs a class in tests/pruning/test_conformance.py."""

TEXT_MODELS = dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), "dop_search.models.text:TextAdapter")
"""Decoders without a vision tower, by ``model_type``: what is pruned is the context of their prompts."""


def is_known(model_type: object) -> bool:
    """Whether an adapter covers a model type."""
    return isinstance(model_type, str) and (model_type in FAMILIES or model_type in TEXT_MODELS)


def auto_class(model_type: str) -> Any:
    """The class of transformers that builds and loads models of a type."""
    return AutoModelForCausalLM if model_type in TEXT_MODELS else AutoModelForImageTextToText


def check_model_type(model_type: str | None, name: str) -> None:
    """Refuse a model type without an adapter; ``name`` is what the user knows it by. UnsupportedModelError listing the
    supported families."""
    if not is_known(model_type):
        near = did_you_mean(str(model_type), FAMILIES)
        raise UnsupportedModelError(
            f"no adapter for {name} (model_type {model_type!r}); {near}supported model types: "
            f"{', '.join(sorted(FAMILIES))}, and for text alone {', '.join(sorted(TEXT_MODELS))}. A new family is one "
            'subclass of ModelAdapter: see "Add a model family" in dop_search/models/README.md'
        )


def adapter_class(model_type: str | None, name: str) -> type[ModelAdapter]:
    """The adapter of a model type, see :func:`check_model_type`."""
    check_model_type(model_type, name)
    entry = TEXT_MODELS.get(str(model_type)) or FAMILIES[str(model_type)]
    module, attribute = entry.split(":")
    found: type[ModelAdapter] = getattr(importlib.import_module(module), attribute)
    return found


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what ``torch.compile`` and peft make of it; UnsupportedModelError for wrappers that must not
    be pruned themselves."""
    while True:
        compiled, base = getattr(model, "_orig_mod", None), getattr(model, "get_base_model", None)
        if isinstance(compiled, nn.Module):
            model = compiled
        elif isinstance(getattr(model, "module", None), nn.Module):
            raise UnsupportedModelError(
                f"{type(model).__name__} is a wrapper around the model; pass its `model.module`"
            )
        elif callable(base):
            model = base()
        else:
            return model


def adapter_for(model: PreTrainedModel) -> ModelAdapter:
    """The adapter of a model, or of what peft or ``torch.compile`` has wrapped; UnsupportedModelError if the model is a
    wrapper or a base model, or no adapter covers its class; lists the supported families."""
    given: object = model
    if not isinstance(given, nn.Module):
        inside = isinstance(getattr(given, "model", None), nn.Module)
        remedy = "pass its `.model`" if inside else "pass a model of transformers"
        raise UnsupportedModelError(f"`model` must be a model, but got {type(given).__name__}; {remedy}")
    inner: Any = unwrapped(given)
    name = type(inner).__name__
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    adapter = adapter_class(model_type, name)
    if inner.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{name} is a base model without a language head; pass the ...ForConditionalGeneration model whose "
            "`model` it is"
        )
    return adapter(inner)
