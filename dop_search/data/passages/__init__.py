"""Passages of text with something to ask about each: for models that read no images."""

from dop_search.data.passages.samples import PASSAGE_FAMILIES, passage_samples

__all__ = ["PASSAGE_FAMILIES", "passage_samples"]
