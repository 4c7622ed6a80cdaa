"""Answers by what is asked for alone: what a checkpoint's generation_config.json adds is left out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

from dop_search.models.loading import LoadedModel


def end_tokens(loaded: LoadedModel) -> list[int]:
    """The tokens that end an answer: those of the checkpoint's generation, or else of its tokenizer."""
    end = loaded.model.generation_config.eos_token_id
    if end is None:
        end = loaded.processor.tokenizer.eos_token_id
    given = end if isinstance(end, (list, tuple)) else [end]
    return [token for token in given if token is not None]


@contextmanager
def plain_generation(loaded: LoadedModel) -> Iterator[None]:
    """Within the context ``generate()`` knows the special tokens and its arguments, and is greedy without any.

    Penalties, suppressed tokens, beams, time limits and the like that a checkpoint ships would change answers which
    strategies are compared by. Placeholders of images are never said: nothing could be put in their place.
    """
    model: Any = loaded.model
    placeholders = loaded.adapter.visual_token_ids if loaded.adapter.has_tower else ()
    shipped = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=shipped.bos_token_id,
        eos_token_id=end_tokens(loaded) or None,
        pad_token_id=loaded.processor.tokenizer.pad_token_id,
        suppress_tokens=list(placeholders) or None,
    )
    try:
        yield
    finally:
        model.generation_config = shipped
