"""The stages of a search with what each holds and computes, by the formulas that the search itself goes by."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dop_search.app.config import SearchConfig, solvers
from dop_search.app.plan.facts import ModelFacts, model_facts
from dop_search.divergence.footprint import SampleSize
from dop_search.divergence.forecast import ChunkForecast, Work
from dop_search.divergence.memory import Allowance, available_bytes, chunk_tokens, cut, host_bytes, limit_bytes
from dop_search.divergence.profiling import SAVE_EVERY, default_shares, make_space
from dop_search.models.loading import DEVICE_MAP_RULE, DEVICE_MAPS, named_device
from dop_search.search import CurveGrid
from dop_search.search.options import GSOP
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import full_flops
from dop_search.strategy.operations import TokenCounts
from dop_search.utils.errors import DopError

TOKEN_BYTES = 9
"""Of a token in the host's memory, beside its embedding: position, and whether it is visual."""
UNKNOWN_CANDIDATES = 256
"""Strategies per budget that a solver of one's own is taken to measure."""
TRAJECTORY_PER_LAYER = 16
"""Strategies per decoder layer that GSOP's search is taken to measure: at most 14 in experiments/compare."""


@dataclass(frozen=True)
class Stage:
    """One stage of a search.

    Attributes:
        device_bytes, host_bytes: what is held on each device, and in host memory, at the peak, by what it is.
        num_layer_forwards: forwards of a decoder layer on a chunk of samples.
        flops: of all of them, and of the vision tower.
        at_most: whether these are upper bounds, as the strategies are not known yet.
    """

    name: str
    device_bytes: dict[str, int]
    host_bytes: dict[str, int]
    num_layer_forwards: int = 0
    flops: int = 0
    at_most: bool = False


@dataclass(frozen=True)
class Plan:
    """All stages, in order, and what there is.

    Attributes:
        device: where it would run; ``is_here``: whether this machine has it.
        num_devices: over which the weights are spread.
        limit_bytes: of each device; ``needed_bytes``: the least that would do.
    """

    facts: ModelFacts
    device: torch.device
    is_here: bool
    num_devices: int
    limit_bytes: int
    stages: tuple[Stage, ...]
    needed_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The most that is held on a device."""
        return max(sum(stage.device_bytes.values()) for stage in self.stages)

    @property
    def is_feasible(self) -> bool:
        """Whether everything fits."""
        return self.peak_bytes <= self.limit_bytes


def make_plan(config: SearchConfig) -> Plan:
    """Plan a search by configurations alone; DopError if the sizes of the model or of the device are not known."""
    make_selector(config.selector.name, config.selector.options)  # or an error: a search would end with it
    return _Stages(config).plan()


def least_bytes(config: SearchConfig, limit: int) -> int:
    """The least limit per device that a search needs: weights, and one sample at a time.

    ``limit``: of each device, for how many devices a ``device_map`` has.
    """
    return _Stages(config, limit).least_bytes()


def _device(config: SearchConfig) -> tuple[torch.device, bool]:
    has_cuda, place = torch.cuda.is_available(), config.model.device_map
    if place in DEVICE_MAPS:
        device = torch.device("cuda")
    elif place is not None:
        device = named_device(place, DEVICE_MAP_RULE)
    elif config.model.device == "auto":
        device = torch.device("cuda" if has_cuda else "cpu")
    else:
        device = named_device(config.model.device)
    return device, device.type == "cpu" or (device.type == "cuda" and has_cuda)


def _limit(config: SearchConfig, device: torch.device, is_here: bool) -> int:
    if config.memory != "auto":
        return limit_bytes(config.memory, device.type)
    if not is_here:
        raise DopError(
            f"there is no {device} on this machine to ask for its memory; set memory to its GiB, as in memory=24"
        )
    return available_bytes(device)


class _Stages:
    def __init__(self, config: SearchConfig, limit: int | None = None) -> None:
        self.config = config
        self.device, self.is_here = _device(config)
        self.facts = model_facts(config.model, config.data, self.device.type)
        self.footprint, self.layers = self.facts.footprint, self.facts.footprint.dims.num_layers
        self.limit = _limit(config, self.device, self.is_here) if limit is None else limit
        self.num_devices = max(2, torch.cuda.device_count()) if config.model.device_map in DEVICE_MAPS else 1
        self.weights = -(-self.facts.weight_bytes // self.num_devices)
        self.on_cpu = self.device.type == "cpu"
        self.sizes = self.facts.prompts
        self.longest = max(self.sizes, key=lambda size: size.length)
        self.heldout = self._repeated(config.data.num_heldout)
        joint = config.search if isinstance(config.search, solvers.JointConfig) else None
        self.deciding = self._repeated(0 if joint is None else config.data.num_decision)
        self.num_selectors = 1 if joint is None else len({config.selector.name, *config.selector.also})
        self.spaces = dict.fromkeys([config.space.name, *([] if joint is None else config.space.also)])
        self.answers = self.num_selectors * self._teacher_bytes([*self.sizes, *self.deciding, *self.heldout])
        self.free = self.limit - self.weights - (self.answers if self.on_cpu else 0)
        one = max(self.footprint.chunk([size]) for size in set(self.sizes))
        self.one = max(one, self._generation_bytes(1))
        self.allowance = Allowance.of(self.free, self.device.type, host_bytes(), self.one)
        self.kept_on = {"device": 0, "host": 0}

    def plan(self) -> Plan:
        """All stages, and the least memory that would do."""
        shard = {} if self.on_cpu else {"a shard of weights": min(self.weights, 5 * 10**9)}
        stages = [
            Stage("load", {"weights": self.weights}, shard),
            self._teacher(),
            self._curves(),
        ]
        if GSOP in self.spaces:
            number = TRAJECTORY_PER_LAYER * self.layers * self.num_selectors
            stages.append(self._score(f"GSOP's trajectories: {number} strategies", self.sizes, [number], [1.0]))
        stages += [self._candidates(), self._score("held-out samples", self.heldout, [2] * len(self.config.budget))]
        if self.config.eval.name == "accuracy" and self.config.data.num_test:
            working, forwards, flops = self._generate(self.config.data.num_test, 1 + 2 * len(self.config.budget))
            held = {"keys, values, activations": working}
            stages.append(self._stage("accuracy", held, forwards, flops, at_most=True))
        place = (self.facts, self.device, self.is_here, self.num_devices, self.limit)
        return Plan(*place, tuple(stages), self.least_bytes())

    def least_bytes(self) -> int:
        """Weights, the teacher where it is on the same device, and one sample at a time."""
        return self.one + self.weights + (self.answers if self.on_cpu else 0)

    def _stage(
        self, name: str, working: dict[str, int], num_layer_forwards: int, flops: int, at_most: bool = False
    ) -> Stage:
        """A stage that holds, beside what it works with, the weights, the answers, and the states that are kept."""
        held = {"weights": self.weights, "hidden states": self.kept_on["device"], **working}
        host = {"answers and embeddings": self.answers, "hidden states": self.kept_on["host"]}
        if self.on_cpu:
            held, host = {**held, "answers and embeddings": self.answers}, {}
        device = {what: size for what, size in held.items() if size}
        return Stage(name, device, host, num_layer_forwards, flops, at_most)

    def _repeated(self, count: int) -> list[SampleSize]:
        return [self.sizes[index % len(self.sizes)] for index in range(count)]

    def _teacher_bytes(self, sizes: Sequence[SampleSize]) -> int:
        return sum(
            self.footprint.states(size.length + self.footprint.deepstack * size.visual)
            + TOKEN_BYTES * size.length
            + 4 * size.answer * self.footprint.dims.vocab_size
            for size in sizes
        )

    def _generation_bytes(self, batch: int) -> int:
        prompt = self.longest.length - self.longest.answer + 1
        return max(self.footprint.generation(batch, prompt, self.longest.answer), batch * self.facts.tower_bytes)

    def _generate(self, count: int, repeats: int = 1) -> tuple[int, int, int]:
        """Bytes, layer forwards and FLOPs of generating answers to so many prompts."""
        answer = self.longest.answer
        prompt = self.longest.length - answer + 1
        together = self.footprint.generated_together(
            self.free - self.kept_on["device"], prompt, answer, self.facts.tower_bytes
        )
        batch = min(self.config.batch_size, together, count)
        forwards = math.ceil(count / batch) * answer * self.layers * repeats
        counts = Counter(self._repeated(count))
        prefill = sum(number * self._prefill_flops(size) for size, number in counts.items())
        decode = count * (answer - 1) * self.facts.linear_flops
        return self._generation_bytes(batch), forwards, repeats * (prefill + decode + count * self.facts.tower_flops)

    def _prefill_flops(self, size: SampleSize) -> int:
        text = size.prefix + size.text - size.answer + 1
        return full_flops(self.footprint.dims, TokenCounts(text, size.visual))

    def _teacher(self) -> Stage:
        asked = [*self.sizes, *self.deciding, *self.heldout]
        working, forwards, flops = self._generate(len(asked))
        if self.config.data.answers == "ground_truth":
            working, forwards, flops = 0, 0, 0
        observing = self.footprint.layer_of([self.longest.length]) + self.footprint.logits(self.longest.answer)
        observed = sum(self._prefill_flops(size) for size in asked) + len(asked) * self.facts.tower_flops
        flops += self.num_selectors * observed
        held = {"keys, values, activations": max(working, observing, self.facts.tower_bytes)}
        forwards += self.num_selectors * len(asked) * self.layers
        return self._stage("full model's answers", held, forwards, flops)

    def _curves(self) -> Stage:
        strategies = self._curve_strategies()
        calls = [strategies[start : start + SAVE_EVERY] for start in range(0, len(strategies), SAVE_EVERY)]
        total, kept = Work(), {"device": 0, "host": 0, "nowhere": 0}
        taken = dict(kept)
        rooms = {"device": self.allowance.keep, "host": self.allowance.host}
        known: dict[tuple[tuple[SampleSize, ...], bool], tuple[Work, int]] = {}
        for chunk in self.num_selectors * self._chunks(self.sizes):
            rows = sum(size.length for size in chunk)
            needed = self.footprint.states(rows, self.layers)
            place = next((p for p, room in rooms.items() if taken[p] + needed <= room), "nowhere")
            past = min(size.prefix for size in chunk)
            taken[place] += self.footprint.states(rows - past * len(chunk), self.layers)
            key = (tuple(chunk), place != "nowhere")
            if key not in known:
                forecast = ChunkForecast(self.footprint, chunk, place != "nowhere")
                work = Work()
                for call in calls:
                    work.add(forecast.call(call))
                known[key] = work, forecast.kept_bytes
            total.add(known[key][0])
            kept[place] += known[key][1]
        self.kept_on = {"device": kept["device"], "host": kept["host"]}
        held, forwards = {"a chunk of samples": total.peak_bytes}, total.layers_computed + total.full_layers
        over = "" if self.num_selectors == 1 else f" over {self.num_selectors} selectors"
        return self._stage(f"curves: {len(strategies)} strategies{over}", held, forwards, total.flops)

    def _curve_strategies(self) -> list[Strategy]:
        chosen, num_visual = self.config.space, max(size.visual for size in self.sizes)
        grid = CurveGrid.of(chosen.num_depth_levels, chosen.num_token_levels)
        points: list[Strategy] = []
        for name in self.spaces:
            shares = chosen.shares if name == chosen.name else default_shares(name)
            space = make_space("uniform" if name == GSOP else name, self.layers, num_visual, shares)
            points += [space.single(p.name, level) for p in space.parameters for level in grid.for_parameter(p)]
        return list({strategy.key(): strategy for strategy in points if not strategy.is_empty}.values())

    def _chunks(self, sizes: Sequence[SampleSize]) -> list[list[SampleSize]]:
        chunks = cut(sizes, self.footprint, self.allowance.work, chunk_tokens(self.device.type))
        return [[sizes[index] for index in members] for members in chunks]

    def _score(
        self, name: str, sizes: Sequence[SampleSize], num_strategies: Sequence[int], ratios: Sequence[float] = ()
    ) -> Stage:
        """Strategies that are not known yet, so many per FLOPs ratio; without ratios: per budget."""
        ratios = ratios or [budget.value if budget.is_ratio else 1.0 for budget in self.config.budget]
        flops = sum(
            int(ratio * count) * self._prefill_flops(size) if ratio * count >= 1 else 0
            for ratio, count in zip(ratios, num_strategies, strict=True)
            for size in sizes
        )
        chunks = self._chunks(sizes)
        working = max(self.footprint.chunk(chunk) for chunk in chunks)
        forwards = sum(num_strategies) * self.layers * len(chunks)
        return self._stage(name, {"a chunk of samples": working}, forwards, flops, at_most=True)

    def _candidates(self) -> Stage:
        match self.config.search:
            case solvers.AdditiveExactConfig() | solvers.AdditiveOptunaConfig() as search:
                number = search.num_rerank + 1
            case solvers.ExactOptunaConfig() as search:
                number = search.num_trials
            case solvers.JointConfig() as search:
                number = search.num_proposals + search.num_sampled
            case solvers.ExhaustiveConfig() as search:
                number = search.max_strategies
            case _:
                number = UNKNOWN_CANDIDATES
        return self._score(f"candidates: {number} per budget", self.sizes, [number] * len(self.config.budget))
