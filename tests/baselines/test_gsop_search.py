"""GSOP's greedy search on small invented problems, against brute force and its own constraints."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from dop_search.baselines.gsop_search import KEY, KV, REST, GsopSearch
from dop_search.strategy import Strategy

LAYERS = 3


def additive(weights: np.ndarray):
    """KL is the sum of the weights of what is skipped, dead operations included."""

    def evaluate(strategies: list[Strategy]) -> np.ndarray:
        return np.array([float((~s.to_array() * weights).sum()) for s in strategies])

    return evaluate


def points_of(weights: np.ndarray, **options: float) -> tuple[GsopSearch, list]:
    weights[:, -1, [module for module in range(3) if module != KV]] = 0.0  # dead in the full model
    search = GsopSearch(additive(weights), weights.shape[1], free_nats=1e-9, **options)
    return search, search.trajectory(lambda strategy: False)


def closed(runs: np.ndarray, first_kv: int) -> bool:
    """Whether a set of operations obeys the constraints."""
    if (runs[KEY] < runs[REST]).any() or not runs[KEY, :first_kv, KV].all():
        return False
    for group in (KEY, REST):
        layers = np.flatnonzero(runs[group, :, KV])
        last = layers[-1] if len(layers) else 0
        if runs[group, last:, [m for m in range(3) if m != KV]].any():
            return False
    return True


@pytest.mark.parametrize("seed", range(6))
def test_every_point_obeys_the_constraints_and_costs_grow(seed: int) -> None:
    weights = np.random.default_rng(seed).random((2, 8, 3))
    search, points = points_of(weights)
    assert search.first_prunable_kv == 2
    skipped = [int((~p.strategy.to_array()).sum()) for p in points]
    assert skipped == sorted(skipped)
    assert len(set(skipped[1:])) == len(skipped[1:])
    for point in points[1:]:
        assert closed(point.strategy.to_array(), 2)
        assert point.divergence == pytest.approx(float((~point.strategy.to_array() * weights).sum()))
    # at the end only the protected keys of the key group are left, and what they keep alive cannot be left out
    assert points[-1].strategy.to_array().sum() == 2


@pytest.mark.parametrize("seed", range(8))
def test_greedy_is_optimal_where_operations_do_not_touch(seed: int) -> None:
    """The rest group's queries and MLPs alone, additive: after each step the set is the cheapest of its size."""
    rng = np.random.default_rng(seed)
    weights = np.full((2, LAYERS, 3), 1e6)
    loose = [(REST, layer, module) for layer in range(LAYERS - 1) for module in range(3) if module != KV]
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
    """Operations that cost nothing from some depth on are gone at the first point, and no others."""
    weights = np.ones((2, 8, 3))
    weights[REST, 5:, KV] = 0.0
    weights[REST, 4:, :] = np.where(np.arange(3) == KV, weights[REST, 4:, :], 0.0)
    weights[:, 7, :] = np.where(np.arange(3) == KV, weights[:, 7, :], 0.0)
    search, points = points_of(weights)
    free = points[search.num_free_points - 1]
    assert free.divergence == 0.0
    depths = free.strategy.depths()
    assert depths == {"q": (7, 4), "kv": (8, 5), "mlp": (7, 4)}
    on_the_way = [point.strategy.depths() for point in points[: search.num_free_points]]
    assert all(depths["kv"][REST] <= on["kv"][REST] for on in on_the_way)
    assert len(on_the_way) > 2


def test_resorting_notices_what_has_changed() -> None:
    """Two operations that are harmless alone and harmful together: after the stride the second goes to the back."""
    pair = [(REST, 0, 0), (REST, 1, 0)]

    def evaluate(strategies: list[Strategy]) -> np.ndarray:
        result = []
        for strategy in strategies:
            gone = ~strategy.to_array()
            value = 0.01 * gone[REST, :7, 2].sum() + 5.0 * gone[:, :, KV].sum() + 5.0 * gone[KEY, :7].sum()
            value += 0.5 * gone[REST, 2:7, 0].sum() + 0.001 * (gone[pair[0]] or gone[pair[1]])
            result.append(value + 3.0 * (gone[pair[0]] and gone[pair[1]]))
        return np.array(result)

    def when_both_are_gone(stride_nats: float) -> int:
        points = GsopSearch(evaluate, 8, free_nats=1e-9, stride_nats=stride_nats).trajectory(lambda s: False)
        both = [not any(point.strategy.to_array()[cell] for cell in pair) for point in points]
        return both.index(True)

    assert when_both_are_gone(1e-6) > when_both_are_gone(1e6)


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
