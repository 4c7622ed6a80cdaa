"""GSOP's search (arXiv 2507.02909v1): greedy sorting of operations. Numbers only, no model.

Two groups by the selector's rank: the *key* group (25 %) and the *rest* (75 %). Three steps:

1. for each group and module a binary search, from ``L / 2`` on, finds the lowest depth from which it can be left out
   for free; all that is free together is the start (points on the way there are kept, for mild budgets);
2. every remaining operation is tried alone on top of it, and they are sorted by what that costs in quality;
3. they are removed in this order; when the quality has fallen by a stride since the last sorting, what remains is
   sorted again.

Constraints: leaving out an operation of the key group leaves out the rest's in the same layer; a query or MLP whose
results no deeper key reads goes with the keys; keys of the key group stay below layer 6 of 32.

GSOP measures exact match on 500 questions with a stride of 1/15 to 1/20 of the accuracy that may be lost. Here
quality is the mean KL, which has no such scale: free is what costs at most ``free_nats``, the stride is the larger of
``stride_nats`` and half of the KL at the last sorting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dop_search.strategy import Strategy
from dop_search.strategy.operations import MODULES, Module

KEY, REST = 0, 1
SHARES = (0.25, 0.75)
KV = MODULES.index(Module.KV)
Evaluate = Callable[[Sequence[Strategy]], np.ndarray]
Cell = tuple[int, int, int]
"""``(group, layer, module)``"""


@dataclass(frozen=True)
class GsopPoint:
    """One state of the search: what runs, and its mean KL in nats."""

    strategy: Strategy
    divergence: float


@dataclass
class GsopSearch:
    """The search, as far as it was asked to go.

    Args:
        evaluate: mean KL of strategies with two groups.
        num_layers: decoder layers.
        fields: further fields of the strategies, such as the selector.
        free_nats, stride_nats: see the module.

    Attributes:
        points: the trajectory so far, from the full model on.
        num_evaluations: strategies scored so far.
        num_free_points: points up to the one that leaves out all that is free.
    """

    evaluate: Evaluate
    num_layers: int
    fields: dict[str, Any] = field(default_factory=dict)
    free_nats: float = 1e-3
    stride_nats: float = 0.02
    points: list[GsopPoint] = field(default_factory=list)
    num_evaluations: int = 0
    num_free_points: int = 0
    _runs: np.ndarray = field(init=False)
    _queue: list[Cell] = field(default_factory=list)
    _sorted_at: float = 0.0

    def __post_init__(self) -> None:
        everything = np.ones((2, self.num_layers, len(MODULES)), dtype=np.bool_)
        self._runs = self._strategy(everything).canonical().to_array()

    @property
    def first_prunable_kv(self) -> int:
        """Keys of the key group stay below this layer."""
        return round(6 * self.num_layers / 32)

    def trajectory(self, enough: Callable[[Strategy], bool]) -> list[GsopPoint]:
        """The points up to the first that is ``enough``, or all there are."""
        if not self.points:
            self._start()
        while not enough(self.points[-1].strategy) and self._step():
            pass
        for index, point in enumerate(self.points):
            if enough(point.strategy):
                return self.points[: index + 1]
        return list(self.points)

    # -- the three steps --------------------------------------------------------------------------

    def _start(self) -> None:
        self.points.append(GsopPoint(self._strategy(self._runs), 0.0))
        free = self._runs
        for group in (KEY, REST):
            for module in range(len(MODULES)):
                depth = self._free_depth(group, module)
                for layer in range(depth, self.num_layers):
                    free = self._without(free, (group, layer, module))
        start = self._runs
        for cut in reversed(range(self.num_layers)):  # the free part itself in steps, deepest layers first
            runs = start.copy()
            runs[:, cut:] = free[:, cut:]
            runs = self._strategy(runs).canonical().to_array()
            if not np.array_equal(runs, self._runs):
                self._runs = runs
                self._record()
        self.num_free_points = len(self.points)
        self._sort()

    def _free_depth(self, group: int, module: int) -> int:
        """The lowest depth from which the module can be left out for free; ``L`` if nowhere."""
        low, high = (self.first_prunable_kv if (group, module) == (KEY, KV) else 0), self.num_layers
        middle = max(low, self.num_layers // 2)
        while low < high:
            runs = self._runs
            for layer in range(middle, self.num_layers):
                runs = self._without(runs, (group, layer, module))
            if self._scores([runs])[0] <= self.free_nats:
                high = middle
            else:
                low = middle + 1
            middle = (low + high) // 2
        return low

    def _sort(self) -> None:
        cells = [cell for cell in self._cells() if self._runs[cell]]
        scores = self._scores([self._without(self._runs, cell) for cell in cells])
        self._queue = [cells[index] for index in np.argsort(scores, kind="stable")]
        self._sorted_at = self.points[-1].divergence

    def _step(self) -> bool:
        """Remove the next operation; ``False`` if none is left."""
        cell = next((cell for cell in self._queue if self._runs[cell]), None)
        if cell is None:
            return False
        self._runs = self._without(self._runs, cell)
        self._queue = [other for other in self._queue if self._runs[other]]
        self._record()
        if self.points[-1].divergence - self._sorted_at > max(self.stride_nats, 0.5 * self._sorted_at):
            self._sort()
        return True

    # -- operations -------------------------------------------------------------------------------

    def _cells(self) -> list[Cell]:
        shape = self._runs.shape
        return [
            (group, layer, module)
            for group, layer, module in np.ndindex(*shape)
            if (group, module) != (KEY, KV) or layer >= self.first_prunable_kv
        ]

    def _without(self, runs: np.ndarray, cell: Cell) -> np.ndarray:
        group, layer, module = cell
        result = runs.copy()
        result[group:, layer, module] = False  # of the key group, and then also of the rest
        return self._strategy(result).canonical().to_array()

    def _strategy(self, runs: np.ndarray) -> Strategy:
        return Strategy.from_array(runs, shares=SHARES, **self.fields)

    def _scores(self, runs: list[np.ndarray]) -> np.ndarray:
        self.num_evaluations += len(runs)
        return self.evaluate([self._strategy(item) for item in runs]) if runs else np.zeros(0)

    def _record(self) -> None:
        self.points.append(GsopPoint(self._strategy(self._runs), float(self._scores([self._runs])[0])))


def with_tokens(point: GsopPoint, num_visual_tokens: int | None) -> Strategy:
    """The same operations with fewer tokens entering the decoder."""
    return replace(point.strategy, num_visual_tokens=num_visual_tokens)
