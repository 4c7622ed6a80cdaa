"""Greedy answers under a strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import dop_search as dop
from dop_search.data.samples import Sample
from dop_search.evaluation.accuracy import generate_answers


def answer_questions(
    loaded: dop.LoadedModel, samples: Sequence[Sample], strategy: dop.Strategy | None = None, **options: Any
) -> list[str]:
    with dop.pruned(loaded.model, strategy or dop.Strategy.full(loaded.adapter.dims.num_layers)):
        return generate_answers(loaded, samples, **options)
