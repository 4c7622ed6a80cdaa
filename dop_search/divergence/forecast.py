"""What scoring strategies will compute and hold, counted from sizes: the engine's own walk without its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from dop_search.divergence.footprint import TOGETHER, Footprint, Rows, SampleSize
from dop_search.divergence.walk import Candidate, Emit, Load, Run, buckets, schedule
from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import flops_coefficients
from dop_search.strategy.operations import LayerKind
from dop_search.strategy.steps import Groups, LayerStep, layer_steps


@dataclass
class Work:
    """Layer forwards that are asked for and computed, those of the full model, and what they take.

    Attributes:
        layers_asked, layers_computed, full_layers: see ``WorkCounter`` of the engine.
        flops: of all computed layers and logits.
        peak_bytes: the most that is held at a time beside weights and hidden states that are kept.
    """

    layers_asked: int = 0
    layers_computed: int = 0
    full_layers: int = 0
    flops: int = 0
    peak_bytes: int = 0

    def add(self, other: Work) -> None:
        """Add the work of another chunk or call."""
        self.layers_asked += other.layers_asked
        self.layers_computed += other.layers_computed
        self.full_layers += other.full_layers
        self.flops += other.flops
        self.peak_bytes = max(self.peak_bytes, other.peak_bytes)


@dataclass
class ChunkForecast:
    """One chunk of samples over all calls of the engine.

    Attributes:
        footprint: what activations take.
        keeps: whether the full model's hidden states stay for later calls.
        known_layers: how many layers of the full model have been computed and kept.
    """

    footprint: Footprint
    samples: Sequence[SampleSize]
    keeps: bool
    known_layers: int = 0
    _work: Work = field(default_factory=Work)
    _priced: dict[tuple[LayerStep, bool, LayerKind], tuple[int, int]] = field(default_factory=dict)

    @property
    def kept_bytes(self) -> int:
        """Hidden states that are kept after the calls so far."""
        return self.footprint.states(sum(self._lengths), self.known_layers + 1) if self.keeps else 0

    def call(self, strategies: Sequence[Strategy]) -> Work:
        """One call of the engine with these strategies."""
        self._work = Work()
        latest = 0
        for bucket in buckets(strategies):
            first = strategies[bucket[0]]
            is_whole = all(first.num_kept(sample.visual) == sample.visual for sample in self.samples)
            self._work.layers_asked += len(bucket) * self.footprint.dims.num_layers
            candidates = [
                Candidate(index, layer_steps(strategies[index]))
                for index in bucket
                if not (is_whole and strategies[index].is_empty)
            ]
            for start in range(0, len(candidates), TOGETHER):
                latest = self._walk(first, candidates[start : start + TOGETHER], is_whole, latest)
        return self._work

    def _walk(self, first: Strategy, candidates: Sequence[Candidate], is_whole: bool, latest: int) -> int:
        """Count one walk; ``latest`` and the result: the layer whose full state is at hand."""
        states: dict[int, int] = {}
        sizes = [first.group_sizes(sample.visual) for sample in self.samples]
        everything = frozenset(range(len(first.groups)))
        self._priced.clear()
        for operation in schedule(candidates, everything, is_whole):
            if isinstance(operation, Load):
                if is_whole:
                    latest = self._full_until(operation.layer, latest, sum(states.values()))
                # A full state is a kept one, or the one on the way, which is counted once.
                states[operation.target] = 0 if is_whole else self._state(sizes, everything)
            elif isinstance(operation, Run):
                source = states.pop(operation.source) if operation.last else states[operation.source]
                self._layer(operation, sizes, sum(states.values()) - (0 if operation.last else source))
                states[operation.target] = self._state(sizes, operation.step.alive)
            else:
                states.pop(operation.source)
                self._logits(operation, sum(states.values()))
        return latest

    def _full_until(self, layer: int, latest: int, waiting: int) -> int:
        """Compute the full model's states up to ``layer``, but for those that are known."""
        start = self.known_layers if self.keeps else (latest if latest <= layer else 0)
        rows = Rows.all(self._lengths)
        for number in range(start, layer):
            self._work.full_layers += 1
            self._work.flops += self._flops(rows, number)
            self._peak(waiting + self.footprint.layer(rows, self._past))
        if self.keeps:
            self.known_layers = max(self.known_layers, layer)
        return layer

    def _layer(self, operation: Run, sizes: Sequence[Sequence[int]], waiting: int) -> None:
        step, last = operation.step, operation.layer == self.footprint.dims.num_layers - 1
        key = step, last, self._kinds[operation.layer]
        if key not in self._priced:
            rows = Rows(
                self._tokens(sizes, step.alive),
                [sample.answer for sample in self.samples] if last else self._tokens(sizes, step.q),
                self._tokens(sizes, step.kv),
                [sample.answer for sample in self.samples] if last else self._tokens(sizes, step.mlp),
            )
            self._priced[key] = self._flops(rows, operation.layer), self.footprint.layer(rows, self._past)
        flops, working = self._priced[key]
        self._work.layers_computed += 1
        self._work.flops += flops
        self._peak(waiting + working)

    def _logits(self, operation: Emit, waiting: int) -> None:
        dims, answers = self.footprint.dims, sum(sample.answer for sample in self.samples)
        self._work.flops += 2 * answers * dims.hidden_size * dims.vocab_size
        self._peak(waiting + self.footprint.logits(answers))

    def _peak(self, moving: int) -> None:
        self._work.peak_bytes = max(self._work.peak_bytes, self._standing + moving)

    @cached_property
    def _standing(self) -> int:
        lengths = self._lengths
        standing = self.footprint.standing(lengths, sum(sample.answer for sample in self.samples), self._past)
        # Where states are kept, the input and the state on the way are among them.
        return standing - (self.footprint.states(2 * sum(lengths)) if self.keeps else 0)

    @cached_property
    def _lengths(self) -> list[int]:
        return [sample.length - self._past for sample in self.samples]

    @cached_property
    def _past(self) -> int:
        return min(sample.prefix for sample in self.samples)

    def _tokens(self, sizes: Sequence[Sequence[int]], groups: Groups) -> list[int]:
        return [
            sample.text + sample.prefix - self._past + sum(its[group] for group in groups)
            for sample, its in zip(self.samples, sizes, strict=True)
        ]

    def _state(self, sizes: Sequence[Sequence[int]], groups: Groups) -> int:
        return self.footprint.states(sum(self._tokens(sizes, groups)))

    @cached_property
    def _kinds(self) -> tuple[LayerKind, ...]:
        return self.footprint.dims.kinds

    def _flops(self, rows: Rows, layer: int) -> int:
        price, past = flops_coefficients(self.footprint.dims, self._kinds[layer]), self._past
        counts = zip(rows.query, rows.keys, rows.mlp, strict=True)
        offered = price.kv * past  # was paid with the prefix
        return sum(price.layer_cost(q, k + past, mlp, max(q, k)) - offered for q, k, mlp in counts)
