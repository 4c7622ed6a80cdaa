"""Solve a method's free hyperparameter for a FLOPs ratio, so that all methods are compared at the same cost."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

from dop_search.baselines.pricing import TOLERANCE
from dop_search.strategy import Strategy
from dop_search.strategy.operations import TokenGroup
from dop_search.strategy.policy import GroupPolicy
from dop_search.utils.errors import BudgetError, DopError

REAL_STEPS = 50
"""Bisections of a real hyperparameter: its strategies are discrete, so that this finds the step next to the target."""


def solve_integer(ratio: Callable[[int], float], low: int, high: int, target: float, what: str) -> int:
    """The integer in ``[low, high]`` whose cost is nearest to ``target``; ``ratio`` must not decrease. BudgetError if
    the cheapest is above the target or the most expensive below it, by more than the tolerance."""
    check_reach(ratio(low), ratio(high), target, what)
    below, above = low, high
    if ratio(low) >= target:
        return low
    while above - below > 1:
        middle = (below + above) // 2
        if ratio(middle) < target:
            below = middle
        else:
            above = middle
    return below if target - ratio(below) <= abs(ratio(above) - target) else above


def solve_layers(
    ratio: Callable[[int, int], float], num_layers: int, num_visual: int, target: float, what: str
) -> tuple[int, int, list[str]]:
    """The fewest running layers whose cost reaches the target (all if none does), and how many tokens then enter.

    Args:
        ratio: the cost of so many running layers on so many tokens.
        what: the method, with ``{}`` for the number of layers.

    Returns:
        Layers, tokens, and notes for a table.
    """
    layers = next((n for n in range(num_layers) if ratio(n, num_visual) >= target), num_layers)
    kept = solve_integer(lambda n: ratio(layers, n), 0, num_visual, target, what.format(layers))
    notes = [] if kept == num_visual else [f"{kept} of {num_visual} tokens enter, to meet the budget exactly"]
    return layers, kept, notes


def solve_real(ratio: Callable[[float], float], low: float, high: float, target: float, what: str) -> float:
    """The number in ``[low, high]`` whose cost is nearest to ``target``; ``ratio`` must not decrease. BudgetError as
    :func:`solve_integer`."""
    step = (high - low) / 2**REAL_STEPS
    return low + step * solve_integer(lambda n: ratio(low + step * n), 0, 2**REAL_STEPS, target, what)


def check_reach(cheapest: float, dearest: float, target: float, what: str) -> None:
    """Refuse a target that the hyperparameter cannot reach; BudgetError naming what can be reached."""
    if cheapest > target * (1 + TOLERANCE):
        raise BudgetError(
            f"{what} cannot go below {cheapest:.4f} of the full model's FLOPs, but {target:.4f} is asked for",
            smallest_feasible=cheapest,
        )
    if dearest < target * (1 - TOLERANCE):
        raise BudgetError(
            f"{what} never costs more than {dearest:.4f} of the full model's FLOPs, but {target:.4f} is asked for",
            smallest_feasible=cheapest,
        )


def nested_strategy(
    num_layers: int, exits: Sequence[int], counts: Sequence[int], keys_stay: int = 0, **fields: object
) -> Strategy:
    """Visual tokens leave for good, worst first: ``counts[0]`` enter, ``counts[i + 1]`` are left from ``exits[i]`` on.

    One token group per exit, and one that stays; empty groups are left out. ``keys_stay``: layers from the exit on in
    which leaving tokens are still keys and values.
    """
    leaving = [before - after for before, after in itertools.pairwise(counts)]
    if min(leaving, default=0) < 0:
        raise DopError(f"`counts` must not rise, for tokens leave for good, but got {list(counts)}")
    groups = []
    for depth, size in zip([num_layers, *reversed(exits)], [counts[-1], *reversed(leaving)], strict=True):
        if size:
            layers, keys = tuple(range(depth)), tuple(range(min(depth + keys_stay, num_layers)))
            groups.append(GroupPolicy(layers, keys, layers, TokenGroup(size / counts[0])))
    return Strategy(num_layers, tuple(groups), **fields)  # type: ignore[arg-type]
