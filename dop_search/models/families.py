"""From a model instance to its adapter, without importing the families that are not used."""

from __future__ import annotations

import importlib

from transformers import PreTrainedModel

from dop_search.errors import UnsupportedModelError
from dop_search.models.adapter import ModelAdapter

FAMILIES: dict[str, str] = {"llava": "dop_search.models.llava:LlavaAdapter"}
"""``model_type`` of the configuration → adapter class."""


def check_model_type(model_type: str | None, name: str) -> None:
    """Refuse a model type without an adapter; ``name`` is what the user knows it by.

    Raises:
        UnsupportedModelError: listing the supported families.
    """
    if model_type not in FAMILIES:
        raise UnsupportedModelError(
            f"no adapter for {name} (model_type {model_type!r}); supported model types: "
            f"{', '.join(sorted(FAMILIES))}. A new family is one subclass of dop_search.models.adapter.ModelAdapter"
        )


def adapter_for(model: PreTrainedModel) -> ModelAdapter:
    """The adapter of a model.

    Raises:
        UnsupportedModelError: if no adapter covers the model's class; lists the supported families.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    check_model_type(model_type, type(model).__name__)
    module, name = FAMILIES[str(model_type)].split(":")
    adapter: type[ModelAdapter] = getattr(importlib.import_module(module), name)
    return adapter(model)
