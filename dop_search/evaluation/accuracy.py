"""Task accuracy: greedy answers of a model, compared with the annotation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dop_search.data.samples import Sample, alike_batches, score_answer
from dop_search.divergence import Memory
from dop_search.divergence.teacher import generate_ids
from dop_search.models.loading import LoadedModel


def generate_answers(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    batch_size: int = 16,
    max_new_tokens: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
    memory: Memory = "auto",
) -> list[str]:
    """Greedy answers, one per sample, through ``generate()`` of the model as it is now, whatever prunes it.

    A call takes ``batch_size`` samples at most, fewer where ``memory`` (GiB on the model's device, weights included)
    needs it; ``on_progress`` is called with (done, total) samples.
    """
    answers: dict[int, str] = {}
    for batch in alike_batches(samples, batch_size):
        ids = generate_ids(loaded, [samples[index] for index in batch], max_new_tokens, memory)
        texts = loaded.processor.batch_decode(ids, skip_special_tokens=True)
        answers.update((index, text.strip()) for index, text in zip(batch, texts, strict=True))
        if on_progress is not None:
            on_progress(len(answers), len(samples))
    return [answers[index] for index in range(len(samples))]


def correct_answers(answers: Sequence[str], samples: Sequence[Sample]) -> np.ndarray:
    """Boolean ``[num_samples]``: whether each answer is accepted; its mean is the accuracy."""
    return np.array([score_answer(text, sample) for text, sample in zip(answers, samples, strict=True)], dtype=np.bool_)
