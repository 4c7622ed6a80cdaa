"""Rendered scenes with questions in the formats of the field's benchmarks: data that needs no download."""

from dop_search.data.rendered.sampling import (
    FAMILIES,
    LONG_FAMILIES,
    RenderedQuestion,
    rendered_questions,
    rendered_samples,
)

__all__ = ["FAMILIES", "LONG_FAMILIES", "RenderedQuestion", "rendered_questions", "rendered_samples"]
