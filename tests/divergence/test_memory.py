"""Memory limits change no number and are kept; what is forecast is what is counted and measured."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.random_teacher import random_model, random_teacher, sizes_of

from dop_search.divergence import DivergenceEngine, make_teacher
from dop_search.divergence import chunks as chunks_module
from dop_search.divergence import engine as engine_module
from dop_search.divergence.footprint import Footprint
from dop_search.divergence.forecast import ChunkForecast
from dop_search.divergence.memory import GIB, release_all, told_bytes, weight_bytes
from dop_search.divergence.teacher import generate_ids
from dop_search.evaluation.timing.shapes import SHAPES
from dop_search.models.loading import load
from dop_search.pruning.layer import run_layer
from dop_search.search import CurveGrid, Space
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.testing.peak_memory import peak_memory
from dop_search.utils.errors import ConfigError, MemoryLimitError

LAYERS = 5


def curve_strategies(num_layers: int, num_visual: int) -> list[Strategy]:
    """What the curves of a space are measured with."""
    space = Space.dop_split(num_layers, num_visual, selector="random")
    grid = CurveGrid(num_token_levels=4)
    points = [space.single(p.name, level) for p in space.parameters for level in grid.for_parameter(p)]
    return [strategy for strategy in points if not strategy.is_empty]


def random_strategies(num_layers: int, num_visual: int, count: int = 8) -> list[Strategy]:
    selector = "random" if num_layers == LAYERS else "cls_attention"
    rng = np.random.default_rng(0)
    depths = rng.integers(0, num_layers + 1, (count, 3)).tolist()
    kept = [None if index % 3 else int(rng.integers(1, num_visual)) for index in range(count)]
    return [
        Strategy.depthwise(num_layers, *its, num_visual_tokens=n, selector=selector)
        for its, n in zip(depths, kept, strict=True)
    ]


CASES = {
    "llava": ("llava_1_5_7b", "sdpa", (40, 40), torch.float32, False),
    "llava-kept": ("llava_1_5_7b", "sdpa", (40, 40), torch.bfloat16, True),
    "llava-uneven": ("llava_1_5_7b", "sdpa", (40, 60, 44), torch.float32, False),
    "llava-eager": ("llava_1_5_7b", "eager", (40,), torch.float32, False),
    "llava-next": ("llava_next_7b", "sdpa", (40,), torch.float32, False),
    "qwen2.5-kept": ("qwen2_5_vl_7b", "sdpa", (40,), torch.float32, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("make", [curve_strategies, random_strategies], ids=["curves", "random"])
@pytest.mark.parametrize("case", CASES)
def test_forecast_is_what_is_counted_and_measured(case, make):
    """Layer forwards to the last one; peak memory, as torch reports it, within 15 per cent."""
    name, attention, num_text, dtype, keep_states = CASES[case]
    adapter, shape = random_model(SHAPES[name], layers=LAYERS, hidden=128, dtype=dtype, attention=attention)
    teacher = random_teacher(adapter, shape, num_text)
    engine = DivergenceEngine(adapter, teacher, keep_states=keep_states)
    engine.batches.max_tokens = 10**9  # one chunk
    forecast = ChunkForecast(engine.batches.footprint, sizes_of(teacher), keep_states)
    for calls in (1, 2):
        strategies = make(LAYERS, shape.num_visual)
        before = vars(engine.work).copy()
        with peak_memory() as peak:
            engine.evaluate(strategies)
        expected = forecast.call(strategies)
        counted = {key: value - before[key] for key, value in vars(engine.work).items()}
        assert counted == {key: getattr(expected, key) for key in counted}
        if calls == 1:  # what is kept then is no part of what the second call allocates
            predicted = expected.peak_bytes + forecast.kept_bytes
            assert 0.9 * peak.num_bytes < predicted < 1.15 * peak.num_bytes


@pytest.fixture(scope="module")
def precise(pocket, few_samples):
    """The bundled model in float64, where the order of sums does not show, and its teacher."""
    loaded = load("pocket")
    loaded.model.double()
    processor = loaded.processor
    teacher = make_teacher(loaded, few_samples, make_selector("cls_attention"), max_new_tokens=6, batch_size=4)
    return replace(loaded, processor=processor), teacher


def limit(adapter, activations: float) -> float:
    """GiB that leave so many bytes beside weights and teachers, with nothing kept by engines of other tests."""
    release_all()
    return (weight_bytes(adapter.model) + told_bytes() + activations) / GIB


@pytest.mark.slow
def test_numbers_do_not_depend_on_the_limit_and_the_limit_is_kept(precise):
    loaded, teacher = precise
    strategies = random_strategies(12, 144, 3)
    free = DivergenceEngine(loaded.adapter, teacher)
    expected = free.evaluate(strategies)
    assert expected.max() > 0.1
    one = max(free.batches.footprint.chunk([size]) for size in sizes_of(teacher))
    del free  # and with it what it keeps, which limits count
    cuts = set()
    for times in (1.0, 2.5, 6.0, 40.0):
        engine = DivergenceEngine(loaded.adapter, teacher, memory=limit(loaded.adapter, times * one))
        with peak_memory() as peak:
            values = engine.evaluate(strategies)
        assert peak.num_bytes < times * one
        np.testing.assert_allclose(values, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(engine.evaluate(strategies[:2], [4, 1]), expected[:2, [4, 1]], rtol=1e-9, atol=1e-12)
        cuts.add((len(engine.batches._cut(range(6))), len(engine.batches._kept)))
    assert len(cuts) >= 3, "the limits must lead to different chunks"


@pytest.mark.slow
def test_kept_on_the_host_or_nowhere_changes_no_bit(precise):
    loaded, teacher = precise
    strategies = random_strategies(12, 144, 3)
    values = {}
    for place in ("device", "host", "nowhere"):
        engine = DivergenceEngine(loaded.adapter, teacher, batch_size=2)
        engine.batches._place = lambda tokens, place=place: place
        values[place] = [engine.evaluate(strategies), engine.evaluate(strategies[::-1])[::-1]]
    for place in ("host", "nowhere"):
        assert all((a == b).all() for a, b in zip(values[place], values["device"], strict=True))


def test_a_limit_that_not_even_one_sample_fits_says_what_would(precise):
    loaded, teacher = precise
    too_little = limit(loaded.adapter, 1e5)
    with pytest.raises(MemoryLimitError, match=r"memory=\d.* beside the weights.*set memory=") as caught:
        DivergenceEngine(loaded.adapter, teacher, memory=too_little).evaluate(random_strategies(12, 144, 2))
    enough = float(re.search(r"set memory=([\d.]+)", str(caught.value))[1])
    DivergenceEngine(loaded.adapter, teacher, memory=enough).evaluate(random_strategies(12, 144, 2))


@pytest.mark.parametrize("memory", [0, -1, "lots", True, None])
def test_refuses_what_is_no_limit(precise, memory):
    with pytest.raises(ConfigError, match="`memory` must be auto or a number of GiB"):
        DivergenceEngine(*(precise[0].adapter, precise[1]), memory=memory)


@pytest.mark.slow
def test_halves_what_does_not_fit_and_remembers(precise, monkeypatch):
    """Whatever forecasts say, a device may be fuller than it seemed."""
    loaded, teacher = precise
    strategies = random_strategies(12, 144, 4)
    expected = DivergenceEngine(loaded.adapter, teacher).evaluate(strategies)
    most, rows = 400, []

    def crowded(layer, hidden, *args, **kwargs):
        rows.append(len(hidden))
        if len(hidden) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")
        return run_layer(layer, hidden, *args, **kwargs)

    monkeypatch.setattr(engine_module, "run_layer", crowded)
    monkeypatch.setattr(chunks_module, "run_layer", crowded)
    engine = DivergenceEngine(loaded.adapter, teacher)
    np.testing.assert_allclose(engine.evaluate(strategies), expected, rtol=1e-9, atol=1e-12)
    assert engine.batches.num_failures > 0
    failures = engine.batches.num_failures
    np.testing.assert_allclose(engine.evaluate(strategies), expected, rtol=1e-9, atol=1e-12)
    assert engine.batches.num_failures == failures, "the second call starts with chunks that fit"
    most = 10
    with pytest.raises(MemoryLimitError, match=r"one sample of \d+ tokens does not fit .*half precision"):
        engine.evaluate(strategies)


def test_other_errors_are_not_swallowed(precise, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("size mismatch")

    monkeypatch.setattr(engine_module, "run_layer", broken)
    with pytest.raises(RuntimeError, match="size mismatch"):
        DivergenceEngine(precise[0].adapter, precise[1]).evaluate(random_strategies(12, 144, 3))


def test_generation_is_split_by_memory_and_says_the_same(pocket, few_samples, teacher):
    footprint = Footprint.of(pocket.adapter)
    for together in (1, 3):
        room = limit(pocket.adapter, footprint.generation(together, 170, 6))
        found = generate_ids(pocket, few_samples.samples, 6, memory=room)
        assert [tuple(row[: len(known.answer_ids)]) for row, known in zip(found, teacher.samples, strict=True)] == [
            sample.answer_ids for sample in teacher.samples
        ]
