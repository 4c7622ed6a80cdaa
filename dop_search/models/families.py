"""From a model instance to its adapter, without importing the families that are not used."""

from __future__ import annotations

import importlib

from torch import nn
from transformers import PreTrainedModel

from dop_search.models.adapter import ModelAdapter
from dop_search.utils.errors import UnsupportedModelError
from dop_search.utils.registry import Registry, did_you_mean

FAMILIES = Registry(
    "model type",
    {
        "llava": "dop_search.models.llava:LlavaAdapter",
        "llava_next": "dop_search.models.llava_next:LlavaNextAdapter",
        "llava_onevision": "dop_search.models.llava_onevision:LlavaOnevisionAdapter",
        "qwen2_vl": "dop_search.models.qwen2_vl:Qwen2VLAdapter",
        "qwen2_5_vl": "dop_search.models.qwen2_5_vl:Qwen2_5VLAdapter",
        "qwen3_vl": "dop_search.models.qwen3_vl:Qwen3VLAdapter",
        "internvl": "dop_search.models.internvl:InternVLAdapter",
    },
    UnsupportedModelError,
)
"""``model_type`` of the configuration → adapter class. An entry needs a class in tests/pruning/test_conformance.py."""


def check_model_type(model_type: str | None, name: str) -> None:
    """Refuse a model type without an adapter; ``name`` is what the user knows it by.

    Raises:
        UnsupportedModelError: listing the supported families.
    """
    if model_type not in FAMILIES:
        near = did_you_mean(str(model_type), FAMILIES)
        raise UnsupportedModelError(
            f"no adapter for {name} (model_type {model_type!r}); {near}supported model types: "
            f"{', '.join(sorted(FAMILIES))}. A new family is one subclass of ModelAdapter: "
            'see "Add a model family" in dop_search/models/README.md'
        )


def adapter_class(model_type: str | None, name: str) -> type[ModelAdapter]:
    """The adapter of a model type, see :func:`check_model_type`."""
    check_model_type(model_type, name)
    module, attribute = FAMILIES[str(model_type)].split(":")
    found: type[ModelAdapter] = getattr(importlib.import_module(module), attribute)
    return found


def adapter_for(model: PreTrainedModel) -> ModelAdapter:
    """The adapter of a model, or of what peft has wrapped.

    Raises:
        UnsupportedModelError: if the model is a wrapper or a base model, or no adapter covers its class; lists the
            supported families.
    """
    name = type(model).__name__
    if isinstance(getattr(model, "module", None), nn.Module):
        raise UnsupportedModelError(f"{name} is a wrapper around the model; pass its `model.module`")
    unwrap = getattr(model, "get_base_model", None)
    if callable(unwrap):
        model = unwrap()
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    adapter = adapter_class(model_type, name)
    if model.get_output_embeddings() is None:
        raise UnsupportedModelError(
            f"{name} is a base model without a language head; pass the ...ForConditionalGeneration model whose "
            "`model` it is"
        )
    return adapter(model)
