"""Layer times from whole prefills: exact where the times are made up, and nothing of the model changes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from dop_search.evaluation.timing import layer_times
from dop_search.evaluation.timing.comparison import environment
from dop_search.evaluation.timing.layer_times import (
    SHARES,
    first_layers,
    grids,
    measure_table,
    synthetic_prompt,
    table_for,
)
from dop_search.evaluation.timing.shapes import SHAPES, build
from dop_search.evaluation.timing.validation import random_strategies, summary, validate_table
from dop_search.models.families import adapter_for
from dop_search.strategy import Strategy
from dop_search.strategy.cost import CostModel
from dop_search.strategy.operations import TokenCounts
from dop_search.strategy.steps import layer_steps
from dop_search.testing.measure import model_state, state_difference
from dop_search.utils.errors import DataError

COUNTS = [TokenCounts(6, 64), TokenCounts(9, 64)]


@pytest.fixture(scope="module")
def model():
    return build(SHAPES["tiny"], torch.device("cpu"), torch.float32)


def fake_clock(monkeypatch, shares=(1.0,)):
    """Prefills that take a made-up time by the tokens of each layer instead of their own."""
    running: list[Strategy] = []
    real = layer_times.pruned

    def pruned(model, strategy, rankings):
        running[:] = [strategy]
        return real(model, strategy, rankings)

    def read(model, adapter, inputs, clock):
        length = inputs["input_ids"].shape[1]
        visual = int(adapter.visual_token_mask(inputs["input_ids"]).sum())
        if not running:
            return 3.0 * len(adapter.layers) + 0.1 * length
        strategy = running.pop()
        sizes = strategy.group_sizes(visual)
        total = 2.0 + 0.01 * length
        for step in layer_steps(strategy):
            keys, queries, mlps = (sum(sizes[g] for g in groups) for groups in (step.kv, step.q, step.mlp))
            total += 0.2 + 0.01 * (length - visual) + 0.003 * keys + 0.02 * queries + 0.05 * mlps
        return total

    monkeypatch.setattr(layer_times, "pruned", pruned)
    monkeypatch.setattr(layer_times, "read_prefill", read)
    monkeypatch.setattr(layer_times, "SHORT_MS", -1.0)
    return read, running


@pytest.mark.parametrize("shares", [(), SHARES])
def test_a_time_that_is_a_sum_over_layers_is_found_again(model, monkeypatch, shares):
    read, running = fake_clock(monkeypatch)
    table = measure_table(model, COUNTS, shares=shares, rounds=1)
    adapter = adapter_for(model)
    groups = (0.25, 0.75) if shares else (1.0,)
    for counts, strategy in itertools.product(COUNTS, random_strategies(4, 64, 15, 1, groups)):
        inputs = synthetic_prompt(model, counts)
        running[:] = [strategy]
        expected = read(model, adapter, inputs, "wall")
        predicted = CostModel(adapter.dims, [counts], "latency", latency=table).absolute(strategy) / 1e6
        assert predicted == pytest.approx(expected, rel=1e-4)
    full = CostModel(adapter.dims, COUNTS, "latency", latency=table).full / 1e6
    assert full == pytest.approx(np.mean([3.0 * 4 + 0.1 * counts.total for counts in COUNTS]))


def test_measuring_changes_nothing_and_is_remembered(model, tmp_path, monkeypatch):
    before = model_state(model)
    table = table_for(model, COUNTS[:1], tmp_path, rounds=1)
    assert not state_difference(before, model_state(model))
    assert ((table.keys_ms + table.queries_ms + table.mlp_ms)[:, -1] > 0).all()
    assert (table.full_ms > 0).all()
    table.check_environment(environment(model, adapter_for(model)))

    def refuse(*args, **kwargs):
        raise AssertionError("measured again")

    monkeypatch.setattr(layer_times, "measure_table", refuse)
    assert table_for(model, COUNTS[:1], tmp_path, rounds=1).to_json() == table.to_json()
    with pytest.raises(AssertionError, match="measured again"):
        table_for(model, COUNTS, tmp_path, rounds=1)


def test_the_first_layers_compute_what_they_compute_in_the_model(model):
    few = first_layers(model, 2)
    assert len(adapter_for(few).layers) == adapter_for(few).dims.num_layers == 2
    assert len(adapter_for(model).layers) == adapter_for(model).dims.num_layers == 4
    assert all(a is b for a, b in zip(few.parameters(), model.parameters(), strict=False) if a.shape == b.shape)
    inputs = synthetic_prompt(model, COUNTS[0])
    with torch.no_grad():
        states = model(**inputs, output_hidden_states=True).hidden_states
        own = few(**inputs, output_hidden_states=True).hidden_states
    torch.testing.assert_close(own[1], states[1])


def test_grids_cover_the_samples():
    text, visual, lengths = grids([TokenCounts(5, 100), TokenCounts(9, 60)])
    assert (text, visual[0], visual[-1], lengths) == ((5, 9), 0, 100, (69, 78, 87, 96, 105))
    assert list(visual) == sorted(set(visual))
    with pytest.raises(DataError, match="at least one sample"):
        measure_table(None, [])


def test_predictions_are_measured_on_the_whole_model(model):
    table = measure_table(model, COUNTS[:1], rounds=1)
    strategies = random_strategies(4, 64, 3)
    assert len({strategy.key() for strategy in strategies}) == 3
    found = validate_table(model, table, COUNTS[0], strategies, rounds=1)
    cost = CostModel(adapter_for(model).dims, COUNTS[:1], "latency", latency=table)
    for item, strategy in zip(found, strategies, strict=True):
        assert item.predicted_ms == cost.absolute(strategy) / 1e6
        assert item.measured_ms > 0
        assert item.error == item.predicted_ms / item.measured_ms - 1
    assert summary(found)["largest_absolute_error"] == max(abs(item.error) for item in found)
