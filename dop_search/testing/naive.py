"""The divergence of a strategy the slow way: what the engine has to agree with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from dop_search.data.samples import Sample
from dop_search.divergence import Teacher
from dop_search.models.loading import LoadedModel
from dop_search.models.prompts import model_inputs, with_answer
from dop_search.pruning import pruned
from dop_search.strategy import Strategy


def naive_divergence(
    loaded: LoadedModel, samples: Sequence[Sample], teacher: Teacher, strategy: Strategy
) -> np.ndarray:
    """KL(full ‖ strategy) in nats per sample, averaged over answer positions.

    Whole forwards of the Hugging Face model, one sample at a time, images and all; no cache, nothing shared.
    """
    result = []
    for sample, known in zip(samples, teacher.samples, strict=True):
        inputs = model_inputs(loaded.processor, [sample], loaded.adapter.device)
        answer = torch.tensor([known.answer_ids[:-1]], dtype=torch.long, device=loaded.adapter.device)
        forced = with_answer(inputs, answer)
        start = inputs["input_ids"].shape[1] - 1
        with torch.inference_mode():
            full = loaded.model(**forced).logits[0, start:].double().log_softmax(dim=-1)
            with pruned(loaded.model, strategy):
                ours = loaded.model(**forced).logits[0, start:].double().log_softmax(dim=-1)
        result.append((full.exp() * (full - ours)).sum(dim=-1).mean().item())
    return np.array(result)
