"""GSOP's search (arXiv 2507.02909v1): greedy sorting of operations, as released. Numbers only, no model.

Two groups by the selector's rank: the *key* group (25 %) and the *rest* (75 %). Three steps:

1. for each group, first the key group, a binary search finds the lowest depth, not below ``L / 2 - 1``, from which
   queries, MLPs and keys together can be left out for free; then, on what has been left out, queries and MLPs; then
   queries. All that is free together is the start (points on the way there are kept, for mild budgets);
2. every remaining operation is tried alone on top of it, and they are sorted by what that costs in quality;
3. they are removed in this order. A removal after which more than ``k`` strides of quality are lost is undone, what
   remains is sorted again, and ``k`` grows by one; it starts at 1.

Constraints: leaving out an operation of the key group leaves out the rest's in the same layer (in steps 2 and 3);
queries and MLPs behind the last layer whose keys run go with the keys; nothing of the key group below layer 6 of 32 and
no keys of the first layer are tried alone.

GSOP measures exact match on 500 questions, with strides of 1/15 to 1/20 of the accuracy that may be lost, and ends when
these are used up. Here quality is the mean KL, which has no such scale: free is what costs at most ``free_nats``, and
the limit grows by ``stride_nats`` or by ``growth`` of itself, whichever is more, until the search is told to stop.

Not reproduced: after a second sorting the released code hands the list of the last good policy to the function that
changes it, so that a later removal that fails is not undone and operations are missing in what it writes. Here every
failed removal is undone.
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
Q, KV, MLP = (MODULES.index(module) for module in (Module.Q, Module.KV, Module.MLP))
TOGETHER = ((Q, MLP, KV), (Q, MLP), (Q,))
"""What step 1 leaves out together, one after the other."""
TRIED = (Q, MLP, KV)
"""The order in which operations of a layer are tried alone, which decides ties."""
Evaluate = Callable[[Sequence[Strategy]], np.ndarray]
Cell = tuple[int, int, int]
"""``(group, layer, module)``"""


@dataclass(frozen=True)
class GsopPoint:
    """One state of the search: what runs, and its mean KL in nats."""

    strategy: Strategy
    divergence: float

    def with_tokens(self, num_visual_tokens: int | None) -> Strategy:
        """The same operations with fewer tokens entering the decoder."""
        return replace(self.strategy, num_visual_tokens=num_visual_tokens)


@dataclass
class GsopSearch:
    """The search, as far as it was asked to go.

    Args:
        evaluate: mean KL of strategies with two groups.
        fields: further fields of the strategies, such as the selector.
        free_nats, stride_nats, growth: see the module; ``growth=0`` are the paper's equal strides.
        num_strides: after so many the search ends; ``None``: never.
        first_prunable: below this layer no operation of the key group is tried alone; ``None``: layer 6 of 32.

    Attributes:
        points: the trajectory so far, from the full model on.
        num_free_points: points up to the one that leaves out all that is free.
    """

    evaluate: Evaluate
    num_layers: int
    fields: dict[str, Any] = field(default_factory=dict)
    free_nats: float = 1e-3
    stride_nats: float = 0.02
    growth: float = 0.5
    num_strides: int | None = None
    first_prunable: int | None = None
    points: list[GsopPoint] = field(default_factory=list)
    num_evaluations: int = 0
    num_free_points: int = 0
    num_sorts: int = 0
    _runs: np.ndarray = field(init=False)
    _queue: list[Cell] = field(default_factory=list)
    _limit: float = field(init=False)
    _strides: int = 1
    _known: dict[bytes, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._runs = np.ones((2, self.num_layers, len(MODULES)), dtype=np.bool_)
        self._limit = self.stride_nats
        if self.first_prunable is None:
            self.first_prunable = round(6 * self.num_layers / 32)

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

    def _start(self) -> None:
        free = self._runs
        for group in (KEY, REST):
            for modules in TOGETHER:
                free = self._freed(free, group, modules)
        start = self._runs
        for cut in reversed(range(self.num_layers)):  # the free part itself in steps, deepest layers first
            self._runs = start.copy()
            self._runs[:, cut:] = free[:, cut:]
            self._record(self._runs)
        self.num_free_points = len(self.points)
        self._sort()

    def _freed(self, runs: np.ndarray, group: int, modules: Sequence[int]) -> np.ndarray:
        """What still runs when the modules are left out together, for free, from the lowest depth on."""

        def without(depth: int) -> np.ndarray:
            result = runs.copy()
            result[group, depth:, modules] = False
            return result

        def is_free(depth: int) -> bool:
            return self._scores([without(depth)])[0] <= self.free_nats

        gone = np.flatnonzero(~runs[group, :, modules[0]])
        low, high = max(0, self.num_layers // 2 - 1), int(gone[0]) if len(gone) else self.num_layers - 1
        if low >= high and len(gone):
            return runs
        if not is_free(high):
            return runs
        if is_free(low):
            return without(low)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if is_free(middle) else (middle, high)
        return without(high)

    def _sort(self) -> None:
        protected = self.first_prunable or 0
        cells = [
            (group, layer, module)
            for layer in range(self.num_layers)
            for group in (KEY, REST)
            for module in TRIED
            if self._runs[group, layer, module]
            and not (group == KEY and layer < protected)
            and not (layer == 0 and module == KV)
        ]
        scores = self._scores([self._without(self._runs, cell) for cell in cells])
        best_last = np.argsort(-scores, kind="stable")  # of equal ones the later is better, as released
        self._queue = [cells[index] for index in reversed(best_last)]
        self.num_sorts += 1

    def _step(self) -> bool:
        """Remove the next operation, or undo that and sort anew; ``False`` if none is left or allowed."""
        if not self._queue or (self.num_strides is not None and self._strides > self.num_strides):
            return False
        runs = self._without(self._runs, self._queue[0])
        (score,) = self._scores([runs])
        if score > self._limit:
            self._strides += 1
            self._limit += max(self.stride_nats, self.growth * self._limit)
            self._sort()
        else:
            self._runs = runs
            self._queue = [cell for cell in self._queue if runs[cell]]
            self._record(runs)
        return True

    def _without(self, runs: np.ndarray, cell: Cell) -> np.ndarray:
        result = runs.copy()
        result[cell] = False
        result[REST] &= result[KEY]
        for group in (KEY, REST):
            last = np.flatnonzero(result[group, :, KV])
            if len(last) and last[-1] < self.num_layers - 1:
                result[group, last[-1] + 1 :] = False
        return result

    def _strategy(self, runs: np.ndarray) -> Strategy:
        return Strategy.from_array(runs, shares=SHARES, **self.fields).canonical()

    def _scores(self, runs: Sequence[np.ndarray]) -> np.ndarray:
        """KL of each; strategies that differ in dead operations alone are scored once."""
        strategies = [self._strategy(item) for item in runs]
        keys = [strategy.to_array().tobytes() for strategy in strategies]
        fresh = {key: strategy for key, strategy in zip(keys, strategies, strict=True) if key not in self._known}
        if fresh:
            self.num_evaluations += len(fresh)
            self._known.update(zip(fresh, self.evaluate(list(fresh.values())).tolist(), strict=True))
        return np.array([self._known[key] for key in keys])

    def _record(self, runs: np.ndarray) -> None:
        """Add a point, unless it differs from the last one in dead operations alone."""
        strategy = self._strategy(runs)
        if not self.points:
            self.points.append(GsopPoint(self._strategy(np.ones_like(runs)), 0.0))
        if strategy != self.points[-1].strategy:
            self.points.append(GsopPoint(strategy, float(self._scores([runs])[0])))
