"""Clocks around parts of a run: what they see, and that they let go."""

from __future__ import annotations

import time

import pytest
import torch

from dop_search.evaluation.timing.timing import prefill_timer, selection_timer
from dop_search.models.prompts import model_inputs
from dop_search.pruning import pruned
from dop_search.selectors import SELECTORS
from dop_search.selectors.attention_choice import ClsAttentionSelector
from dop_search.strategy import Strategy

SLEEP_MS = 40.0


class Sleepy(ClsAttentionSelector):
    """Takes its time over every sample."""

    def rank(self, inputs, num_kept=None):
        time.sleep(SLEEP_MS / 1000)
        return super().rank(inputs, num_kept)


def test_the_selections_own_time_is_seen_and_is_part_of_the_prefill(pocket, few_samples, monkeypatch):
    monkeypatch.delitem(SELECTORS, "cls_attention")  # a name that is taken cannot be given
    monkeypatch.setitem(SELECTORS, "cls_attention", Sleepy)
    inputs = model_inputs(pocket.processor, few_samples.samples[:2], pocket.adapter.device)
    strategy = Strategy.full(12, num_visual_tokens=20, selector="cls_attention")
    device = pocket.adapter.device
    with pruned(pocket.model, strategy), torch.inference_mode():
        with selection_timer(device) as spent, prefill_timer(pocket.adapter) as timer:
            pocket.model(**inputs, use_cache=True, logits_to_keep=1)
        seen = len(spent)
        pocket.model(**inputs, use_cache=True, logits_to_keep=1)
    assert len(spent) == seen, "outside the context nothing is timed"
    assert 2 * SLEEP_MS <= sum(spent) < timer.ms


def test_an_exception_ends_the_timing(pocket, few_samples):
    inputs = model_inputs(pocket.processor, few_samples.samples[:1], pocket.adapter.device)
    strategy = Strategy.full(12, num_visual_tokens=20, selector="cls_attention")
    with pytest.raises(RuntimeError, match="inside"), selection_timer(pocket.adapter.device) as spent:
        raise RuntimeError("inside")
    with pruned(pocket.model, strategy), torch.inference_mode():
        pocket.model(**inputs, use_cache=True, logits_to_keep=1)
    assert spent == []
