"""GSOP's greedy search on small invented problems, against brute force and its own constraints.

What the released search chooses is in ``tests/golden/test_golden_searches.py``.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dop_search.search.gsop_search import KEY, KV, REST, GsopSearch
from dop_search.strategy import Strategy

DEAD = [module for module in range(3) if module != KV]


def additive(weights: np.ndarray):
    """KL is the sum of the weights of what is skipped, dead operations included."""

    def evaluate(strategies: list[Strategy]) -> np.ndarray:
        return np.array([float((~s.to_array() * weights).sum()) for s in strategies])

    return evaluate


def points_of(weights: np.ndarray, **options: float) -> tuple[GsopSearch, list]:
    weights[:, -1, DEAD] = 0.0  # dead in the full model
    search = GsopSearch(additive(weights), weights.shape[1], free_nats=1e-9, **options)
    return search, search.trajectory(lambda strategy: False)


def closed(runs: np.ndarray, first: int) -> bool:
    """Whether a set of operations obeys the constraints: dead ones aside, the rest does no more than the key group."""
    alive = runs.copy()
    for group in (KEY, REST):
        layers = np.flatnonzero(runs[group, :, KV])
        if not len(layers) or runs[group, layers[-1] :, DEAD].any():
            return False
        alive[KEY, layers[-1] if group == KEY else 0 :, DEAD] |= group == KEY
    return bool((alive[KEY] >= runs[REST]).all() and runs[:, 0, KV].all() and runs[KEY, : first - 1].all())


@pytest.mark.parametrize("seed", range(6))
def test_every_point_obeys_the_constraints_and_costs_grow(seed: int) -> None:
    weights = np.random.default_rng(seed).random((2, 8, 3)) + 0.1
    search, points = points_of(weights)
    assert search.first_prunable == 2
    skipped = [int((~p.strategy.to_array()).sum()) for p in points]
    assert skipped == sorted(set(skipped))
    for point in points:
        assert closed(point.strategy.to_array(), 2)
        assert point.divergence == pytest.approx(float((~point.strategy.to_array() * weights).sum()))
    # at the end only what may not be left out is left: the key group's first layers, and the rest's first keys
    left = points[-1].strategy.to_array()
    assert left[KEY].sum() == 4  # keys of layers 0 and 1, which layer 0's query and MLP feed
    assert left[REST].sum() == 1


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_optimal_where_operations_do_not_touch(seed: int) -> None:
    """The rest group's queries and MLPs alone, additive: after each step the set is the cheapest of its size."""
    rng, layers = np.random.default_rng(seed), 3
    weights = np.full((2, layers, 3), 1e6)
    loose = [(REST, layer, module) for layer in range(layers - 1) for module in DEAD]
    for cell in loose:
        weights[cell] = rng.uniform(1, 2)
    points = [point for point in points_of(weights)[1] if point.divergence < 1e5]
    sizes = set()
    for point in points:
        gone = [cell for cell in loose if not point.strategy.to_array()[cell]]
        best = min(sum(weights[cell] for cell in some) for some in itertools.combinations(loose, len(gone)))
        assert point.divergence == pytest.approx(best)
        sizes.add(len(gone))
    assert sizes == set(range(len(loose) + 1))


def test_free_depths_are_found() -> None:
    """What costs nothing from some depth on is gone at the first point, and nothing else; not below half the depth."""
    weights = np.ones((2, 8, 3))
    weights[:, 7, DEAD] = 0.0  # dead
    weights[REST, 5:, KV] = 0.0
    weights[REST, 1:, DEAD] = 0.0
    search, points = points_of(weights)
    free = points[search.num_free_points - 1]
    assert free.divergence == 0.0
    assert free.strategy.depths() == {"q": (7, 3), "kv": (8, 5), "mlp": (7, 3)}
    on_the_way = [point.strategy.depths() for point in points[: search.num_free_points]]
    assert all(depths["kv"][REST] >= free.strategy.depths()["kv"][REST] for depths in on_the_way)
    assert len(on_the_way) > 2


def test_a_removal_that_costs_too_much_is_undone_and_all_is_sorted_anew() -> None:
    """Two operations that are harmless alone and harmful together: the second goes once the limit allows it."""
    pair = [(REST, 0, 0), (REST, 1, 0)]

    def evaluate(strategies: list[Strategy]) -> np.ndarray:
        result = []
        for strategy in strategies:
            gone = ~strategy.to_array()
            value = 0.01 * gone[REST, :7, 2].sum() + 5.0 * gone[:, :, KV].sum() + 5.0 * gone[KEY, :7].sum()
            value += 0.5 * gone[REST, 2:7, 0].sum() + 0.001 * (gone[pair[0]] or gone[pair[1]])
            result.append(value + 3.0 * (gone[pair[0]] and gone[pair[1]]))
        return np.array(result)

    def when_both_are_gone(stride_nats: float) -> tuple[int, int]:
        search = GsopSearch(evaluate, 8, free_nats=1e-9, stride_nats=stride_nats)
        points = search.trajectory(lambda strategy: False)
        both = [not any(point.strategy.to_array()[cell] for cell in pair) for point in points]
        return both.index(True), search.num_sorts

    careful, careless = when_both_are_gone(0.05), when_both_are_gone(1e6)
    assert careful[0] > careless[0]
    assert careful[1] > careless[1] == 1


def test_strategies_that_differ_in_dead_operations_are_scored_once() -> None:
    asked: list[bytes] = []

    def evaluate(strategies: list[Strategy]) -> np.ndarray:
        asked.extend(strategy.canonical().to_array().tobytes() for strategy in strategies)
        return additive(np.ones((2, 8, 3)))(strategies)

    search = GsopSearch(evaluate, 8)
    search.trajectory(lambda strategy: False)
    assert len(asked) == len(set(asked)) == search.num_evaluations


def test_stops_early_and_goes_on_later() -> None:
    weights = np.random.default_rng(0).random((2, 8, 3))
    search = GsopSearch(additive(weights), 8)
    some = search.trajectory(lambda strategy: len(strategy.skipped()) >= 15)
    spent = search.num_evaluations
    assert len(some[-1].strategy.skipped()) >= 15 > len(some[-2].strategy.skipped())
    assert search.trajectory(lambda strategy: len(strategy.skipped()) >= 15) == some
    assert search.num_evaluations == spent
    more = search.trajectory(lambda strategy: len(strategy.skipped()) >= 25)
    assert more[: len(some)] == some
