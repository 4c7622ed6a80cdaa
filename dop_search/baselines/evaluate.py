"""One way to evaluate every method: KL by prefill and cached continuation, answers by ``generate()``.

The divergence engine shares prefixes between strategies and knows each sample's ranking in advance; what ranks inside
the decoder, or removes layers, is scored here by plain forwards of the model as it would run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.data.samples import Sample, alike_batches
from dop_search.divergence import Memory, Teacher, kl_divergence
from dop_search.divergence.encoding import encode
from dop_search.divergence.teacher import TeacherSample
from dop_search.evaluation.accuracy import generate_answers
from dop_search.evaluation.runnable import Runnable, reading, running
from dop_search.models.loading import LoadedModel
from dop_search.models.prompts import model_inputs
from dop_search.selectors import make_selector
from dop_search.utils.errors import DopError, NumericalError


@dataclass(frozen=True)
class Outcome:
    """What pruning did to the full model's answers.

    Attributes:
        divergence: KL(full ‖ method) in nats, averaged over each sample's answer positions, ``[num_samples]`` float64.
        same_answer: whether the method's greedy answer is the full model's, token by token, boolean ``[num_samples]``.
    """

    divergence: np.ndarray
    same_answer: np.ndarray


def plain_outcome(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    teacher: Teacher,
    method: Runnable,
    *,
    batch_size: int = 8,
    on_progress: Callable[[int, int], None] | None = None,
) -> Outcome:
    """Run a method on a teacher's samples, and compare with what the full model said.

    The prompt is one prefill, as in ``generate()``, and the teacher's answer continues on the cache it left: a method
    that looks at the last token of the prompt sees that token. Greedy answers are the same exactly if every token of
    the teacher's answer is the most likely one after those before it.

    Args:
        loaded: the model.
        samples: the samples that ``teacher`` was made from, in the same order.
        teacher: the full model's answers.
        method: a strategy, also with stages, or a fitted method.
        batch_size: samples per forward.
        on_progress: called with (done, total) samples.

    Raises:
        DopError: if the samples are not the teacher's.
        NumericalError: if a logit is not finite.
    """
    if [sample.id for sample in samples] != [known.id for known in teacher.samples]:
        raise DopError("`samples` must be those that the teacher was made from, in the same order")
    result = Outcome(np.zeros(len(samples)), np.zeros(len(samples), dtype=np.bool_))
    done, own = 0, reading(loaded, method)
    with running(loaded.model, method):
        for batch in alike_batches(samples, batch_size):
            part, asked = [teacher.samples[index] for index in batch], [samples[index] for index in batch]
            if own is not loaded:
                part = [_read_anew(own, sample, item) for sample, item in zip(asked, part, strict=True)]
            scores, same = _score_batch(own, asked, part)
            result.divergence[batch], result.same_answer[batch] = scores, same
            done += len(batch)
            if on_progress is not None:
                on_progress(done, len(samples))
    return result


def plain_divergence(
    loaded: LoadedModel, samples: Sequence[Sample], teacher: Teacher, method: Runnable, **options: Any
) -> np.ndarray:
    """The divergence of :func:`plain_outcome`, in nats ``[num_samples]``."""
    return plain_outcome(loaded, samples, teacher, method, **options).divergence


def _read_anew(loaded: LoadedModel, sample: Sample, known: TeacherSample) -> TeacherSample:
    """What the full model said, beside another prompt of the same sample."""
    inputs = model_inputs(loaded.processor, [sample], loaded.adapter.device)
    encoded = encode(loaded.adapter, inputs, known.answer_ids, make_selector("uniform_grid"))
    return replace(known, encoded=encoded)


@torch.inference_mode()
def _score_batch(
    loaded: LoadedModel, samples: Sequence[Sample], known: Sequence[TeacherSample]
) -> tuple[list[float], list[bool]]:
    device = loaded.adapter.device
    inputs = model_inputs(loaded.processor, samples, device)
    mask, length = inputs["attention_mask"], inputs["input_ids"].shape[1]
    longest = max(len(item.answer_ids) for item in known) - 1
    positions = [item.encoded.position_ids.to(device) for item in known]
    prompts = [its[:, : item.encoded.prompt_length] for its, item in zip(positions, known, strict=True)]
    answers = [its[:, item.encoded.prompt_length :] for its, item in zip(positions, known, strict=True)]
    model: Any = loaded.model
    output = model(**inputs, position_ids=_positions(prompts, length, left=True), use_cache=True)
    logits = [output.logits[:, -1:]]
    if longest:
        pad = loaded.processor.tokenizer.pad_token_id
        ids = torch.full((len(known), longest), pad, dtype=inputs["input_ids"].dtype, device=device)
        real = torch.zeros_like(ids)
        for row, item in enumerate(known):
            fed = item.answer_ids[:-1]
            ids[row, : len(fed)] = torch.tensor(fed, dtype=ids.dtype, device=device)
            real[row, : len(fed)] = 1
        continued = model(
            input_ids=ids,
            attention_mask=torch.cat([mask, real], dim=1),
            position_ids=_positions(answers, longest, left=False),
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        logits.append(continued.logits)
    log_probs = torch.cat(logits, dim=1).float().log_softmax(dim=-1)
    scores, same = [], []
    for row, item in enumerate(known):
        its = log_probs[row, : len(item.answer_ids)]
        values = kl_divergence(item.log_probs.to(its.device), its)
        if not bool(torch.isfinite(values).all()):
            raise NumericalError(f"the logits for sample {item.id!r} are not finite; use dtype=float32 or bfloat16")
        scores.append(float(values.double().mean()))
        same.append(its.argmax(dim=-1).tolist() == list(item.answer_ids))
    return scores, same


def _positions(rows: Sequence[Tensor], length: int, left: bool) -> Tensor:
    """``[axes, n]`` per sample to ``[batch, length]``, or ``[axes, batch, length]`` for multimodal RoPE."""
    padded = []
    for row in rows:
        padding = (length - row.shape[1], 0) if left else (0, length - row.shape[1])
        padded.append(torch.nn.functional.pad(row, padding))
    stacked = torch.stack(padded, dim=1)
    return stacked[0] if len(stacked) == 1 else stacked


def plain_answers(
    loaded: LoadedModel,
    samples: Sequence[Sample],
    method: Runnable,
    *,
    batch_size: int = 16,
    max_new_tokens: int = 16,
    on_progress: Callable[[int, int], None] | None = None,
    memory: Memory = "auto",
) -> list[str]:
    """Greedy answers through ``generate()``, one per sample; for ``memory`` see ``make_teacher``."""
    with running(loaded.model, method):
        return generate_answers(reading(loaded, method), samples, batch_size, max_new_tokens, on_progress, memory)
