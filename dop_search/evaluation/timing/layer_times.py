"""Measure a :class:`LatencyTable`: what layers take on this device, inside pruned forwards of this model.

Kernels timed one by one don't add up to a forward, so whole prefills are timed: of a copy of the model with its first
few layers (the others are alike), under strategies in which every layer does the same. What a layer takes follows from
differences. The copy shares the weights.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dop_search.evaluation.timing.comparison import environment
from dop_search.evaluation.timing.timing import Clock, OnProgress, interleaved, read_prefill
from dop_search.models.families import adapter_for
from dop_search.models.text import TextAdapter
from dop_search.pruning import pruned
from dop_search.strategy import Strategy
from dop_search.strategy.cost import LatencyTable
from dop_search.strategy.operations import TokenCounts
from dop_search.utils.errors import DataError

SHARES = (0.25, 0.5, 0.75)
"""Shares of the visual tokens that take part, for strategies with several token groups."""
NUM_LENGTHS = 5
"""Prompt lengths at which the whole decoder is measured: its time is not linear between shortest and longest."""
NUM_LAYERS = 6
"""Layers of the copy that is timed."""
SHORT_MS = 300.0
"""Measurements below this are taken twice, and the second counts."""
LONG_MS, LONG_ROUNDS = 1000.0, 3
"""Points that take longer than this need no more rounds than this."""

Key = tuple[Any, ...]


class _Job(NamedTuple):
    """One thing to time: a prefill of a model under a strategy."""

    key: Key
    model: PreTrainedModel
    inputs: dict[str, Tensor]
    enter: Callable[[], AbstractContextManager[Any]]


def measure_table(
    model: PreTrainedModel,
    counts: Sequence[TokenCounts],
    *,
    shares: Sequence[float] = (),
    rounds: int = 5,
    clock: Clock = "wall",
    seed: int = 0,
    on_progress: OnProgress | None = None,
) -> LatencyTable:
    """Measure layer times that cover samples of these token counts.

    Args:
        model: a supported model, on the device and with the attention backend that it will run with.
        counts: text and visual tokens of each sample.
        shares: shares of the visual tokens to measure between none and all; for spaces with token groups ``SHARES``.
        rounds: measurements per point, of which the median counts; points are visited in turn.
        clock: wall clock, or the time that this process computed.
        seed: of the order.
        on_progress: called with (done, total, what).
    """
    if not counts:
        raise DataError("a latency table needs the token counts of at least one sample, but got none")
    adapter = adapter_for(model)
    grid, depth = grids(counts), min(NUM_LAYERS, adapter.dims.num_layers)
    jobs = _jobs(model, depth, grid, shares)
    readings = _time(jobs, rounds, clock, seed, on_progress)
    ms = {key: float(np.median(values)) for key, values in readings.items()}
    return _table(ms, environment(model, adapter, clock), adapter.dims.num_layers, depth, grid, shares)


class Grid(NamedTuple):
    """Text tokens, visual tokens and prompt lengths at which to measure, ascending."""

    text: tuple[int, ...]
    visual: tuple[int, ...]
    lengths: tuple[int, ...]


def grids(counts: Sequence[TokenCounts]) -> Grid:
    """The points that cover these samples."""
    texts, totals = [item.text for item in counts], [item.total for item in counts]
    most = max(item.visual for item in counts)
    fractions = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 5 / 8, 3 / 4, 7 / 8, 1)
    visual = {0, *(max(1, round(most * fraction)) for fraction in fractions)} if most else {0}
    between = np.linspace(min(totals), max(totals), NUM_LENGTHS).round().astype(int).tolist()
    return Grid(tuple(sorted({min(texts), max(texts)})), tuple(sorted(visual)), tuple(sorted(set(between))))


def table_for(
    model: PreTrainedModel,
    counts: Sequence[TokenCounts],
    cache_dir: Path,
    *,
    shares: Sequence[float] = (),
    rounds: int = 5,
    clock: Clock = "wall",
    on_progress: OnProgress | None = None,
) -> LatencyTable:
    """The table of this model on this device for these samples, from ``cache_dir`` if it was measured before."""
    where = environment(model, adapter_for(model), clock)
    key = json.dumps([where, grids(counts), list(shares), rounds], sort_keys=True)
    path = cache_dir / f"latency-{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if path.is_file():
        return LatencyTable.load(path, where)
    table = measure_table(model, counts, shares=shares, rounds=rounds, clock=clock, on_progress=on_progress)
    table.save(path)
    return table


def first_layers(model: PreTrainedModel, num_layers: int) -> PreTrainedModel:
    """A copy of ``model`` with its first decoder layers, sharing their weights; ``model`` stays as it is."""
    shared: dict[int, Any] = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    result = copy.deepcopy(model, shared)
    text_model = adapter_for(result).text_model
    text_model.layers = nn.ModuleList(list(text_model.layers)[:num_layers])
    for config in {id(c): c for c in (result.config.get_text_config(), text_model.config)}.values():
        config.num_hidden_layers = num_layers
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = config.layer_types[:num_layers]
    return result


def synthetic_prompt(model: PreTrainedModel, counts: TokenCounts) -> dict[str, Tensor]:
    """A prompt of these token counts without images: the decoder gets the embedding of the image token instead.

    A model that reads text alone gets a context, between markers, which are among the text.
    """
    adapter, vocabulary = adapter_for(model), adapter_for(model).dims.vocab_size
    opening: list[int] = []
    closing: list[int] = []
    if isinstance(adapter, TextAdapter):
        opening, closing = adapter.markers
        text = visual = next(token for token in range(vocabulary) if token not in adapter.visual_token_ids)
    else:
        visual = int(model.config.image_token_id)
        text = visual + 9 if visual + 9 < vocabulary else visual - 1
    around = counts.text - len(opening) - len(closing)
    before = around // 2
    inside = [*opening, *[visual] * counts.visual, *closing]
    input_ids = torch.tensor([[*[text] * before, *inside, *[text] * (around - before)]], device=adapter.device)
    return {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}


def image_order(inputs: dict[str, Tensor], model: PreTrainedModel) -> np.ndarray:
    """A ranking of a synthetic prompt's visual tokens; which ones are kept makes no difference to the time."""
    return np.arange(int(adapter_for(model).visual_token_mask(inputs["input_ids"]).sum()))


def _jobs(model: PreTrainedModel, depth: int, grid: Grid, shares: Sequence[float]) -> list[_Job]:
    text, visual, lengths = grid
    stack, single = first_layers(model, depth), first_layers(model, 1)
    jobs: list[_Job] = []

    def add(key: Key, where: PreTrainedModel, inputs: dict[str, Tensor], strategy: Strategy | None) -> None:
        order = [image_order(inputs, where)]
        enter = nullcontext if strategy is None else lambda: pruned(where, strategy, rankings=order)
        jobs.append(_Job(key, where, inputs, enter))

    for length in lengths:
        shortest = synthetic_prompt(model, TokenCounts(text[0], length - text[0]))
        add(("full", length), model, shortest, None)
        for name, where, layers in (("bare_stack", stack, depth), ("bare_single", single, 1)):
            add((name, length), where, shortest, _strategy(layers, 0, 0, 0, length))
    for t in text:
        inputs = synthetic_prompt(model, TokenCounts(t, visual[-1]))
        add(("text", t), stack, inputs, _strategy(depth, 0, 0, 0, visual[-1]))
        for v in visual[1:]:
            for state in ("k", "qk", "km", "qkm"):
                q, mlp = depth * ("q" in state), depth * ("m" in state)
                add((state, t, v), stack, inputs, _strategy(depth, q, depth, mlp, v))
            for share in shares:
                cut = {"shares": [share, 1.0 - share]}
                add(("q_part", t, v, share), stack, inputs, _strategy(depth, [depth, 0], depth, 0, v, **cut))
                add(("m_part", t, v, share), stack, inputs, _strategy(depth, 0, depth, [depth, 0], v, **cut))
    return jobs


def steady_prefill(model: PreTrainedModel, inputs: dict[str, Tensor], clock: Clock) -> float:
    """Milliseconds of a prefill; of a second one if it is short, since the first after a switch meets cold caches."""
    adapter = adapter_for(model)
    first = read_prefill(model, adapter, inputs, clock)
    return first if first > SHORT_MS else read_prefill(model, adapter, inputs, clock)


def _strategy(layers: int, q: Any, kv: Any, mlp: Any, tokens: int, **fields: Any) -> Strategy:
    return Strategy.depthwise(layers, q, kv, mlp, num_visual_tokens=tokens, selector="uniform_grid", **fields)


def _time(
    jobs: Sequence[_Job], rounds: int, clock: Clock, seed: int, on_progress: OnProgress | None
) -> dict[Key, list[float]]:
    def measure(index: int, before: list[float]) -> float | None:
        if len(before) >= LONG_ROUNDS and min(before) > LONG_MS:
            return None
        job = jobs[index]
        with job.enter():
            return steady_prefill(job.model, job.inputs, clock)

    warmup = 1 if jobs[0].model.device.type == "cuda" else 0
    names = ["layer times on this device"] * len(jobs)
    readings = interleaved(measure, names, rounds=rounds, warmup=warmup, seed=seed, on_progress=on_progress)
    return {job.key: values for job, values in zip(jobs, readings, strict=True)}


def _table(
    ms: dict[Key, float], where: dict[str, Any], num_layers: int, depth: int, grid: Grid, shares: Sequence[float]
) -> LatencyTable:
    """From whole prefills to layers. Queries and MLP of the last layer of each are dead, its keys are not."""
    text, visual, lengths = grid
    running = max(1, depth - 1)
    bare_layer = {n: (ms["bare_stack", n] - ms["bare_single", n]) / running for n in lengths}
    fixed = {n: max(0.0, ms["bare_single", n] - bare_layer[n]) for n in lengths}
    keys, queries, mlp = (np.zeros((len(text), len(visual))) for _ in range(3))
    parts = {name: np.zeros((len(text), len(visual), len(shares))) for name in ("q_part", "m_part")}
    for row, t in enumerate(text):
        beside = float(np.interp(t + visual[-1], lengths, [fixed[n] for n in lengths]))
        keys[row, 0] = (ms["text", t] - beside) / depth
        for column, v in enumerate(visual[1:], start=1):
            base, with_q, with_m, with_both = (ms[state, t, v] for state in ("k", "qk", "km", "qkm"))
            keys[row, column] = (base - beside) / depth
            queries[row, column] = ((with_q - base) + (with_both - with_m)) / 2 / running
            mlp[row, column] = ((with_m - base) + (with_both - with_q)) / 2 / running
            for index, share in enumerate(shares):
                for name, values in parts.items():
                    values[row, column, index] = (ms[name, t, v, share] - base) / running
    table = LatencyTable(
        environment=where,
        num_layers=num_layers,
        text=text,
        visual=visual,
        shares=tuple(shares),
        keys_ms=keys,
        queries_ms=queries,
        mlp_ms=mlp,
        queries_part_ms=parts["q_part"],
        mlp_part_ms=parts["m_part"],
        lengths=lengths,
        fixed_ms=np.array([fixed[n] for n in lengths]),
        full_ms=np.array([ms["full", n] for n in lengths]),
    )
    return LatencyTable.from_json(table.to_json())  # rounded as in the file, so that a cached table gives the same
