"""The divergence that VTW and ShortV choose by: KL(pruned ‖ full) at the last token of the prompt.

It is the other way round than the divergence that is searched and compared by, KL(full ‖ pruned) over the answer, and
the published thresholds are its values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from dop_search.divergence import DivergenceEngine, Teacher, kl_divergence
from dop_search.divergence.teacher import TeacherSample
from dop_search.models.adapter import ModelAdapter
from dop_search.strategy import Strategy

Evaluate = Callable[[Sequence[Strategy]], np.ndarray]
"""Mean divergence in nats of each strategy (``[num_strategies]``); none of them may have stages."""


def divergence_at_prompt(adapter: ModelAdapter, teacher: Teacher) -> Evaluate:
    """Mean KL(pruned ‖ full) in nats over the teacher's samples, at the last token of each prompt."""
    prompts = Teacher(tuple(map(_without_answer, teacher.samples)), teacher.fingerprint, teacher.selector)

    def from_pruned(full: Tensor, pruned: Tensor) -> Tensor:
        return kl_divergence(pruned, full)

    def evaluate(strategies: Sequence[Strategy]) -> np.ndarray:  # an engine that holds nothing between calls
        engine = DivergenceEngine(adapter, prompts, keep_states=False, divergence=from_pruned)
        return mean_divergence(engine)(strategies)

    return evaluate


def mean_divergence(engine: DivergenceEngine) -> Evaluate:
    """What an engine measures, averaged over its samples."""
    return lambda strategies: np.asarray(engine.evaluate(strategies).mean(axis=1))


def _without_answer(sample: TeacherSample) -> TeacherSample:
    encoded, end = sample.encoded, sample.encoded.prompt_length
    prompt = replace(
        encoded, embeds=encoded.embeds[:end], position_ids=encoded.position_ids[:, :end], visual=encoded.visual[:end]
    )
    return replace(sample, encoded=prompt, answer_ids=sample.answer_ids[:1], log_probs=sample.log_probs[:1])
