"""Small invented problems and their brute force, shared by the tests of the solvers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
from hypothesis import strategies as st

from dop_search.search import EvaluationStore, Evaluator, Problem, Space, Surrogate
from dop_search.strategy import Strategy
from dop_search.strategy.cost import CostModel, LatencyTable
from dop_search.strategy.operations import ModelDims, OtherHeads, RecurrentDims, TokenCounts


def make_space(kind: str, num_layers: int, num_visual_tokens: int, **options: int) -> Space:
    if kind == "dop_groups":
        return Space.dop_groups(num_layers, num_visual_tokens, shares=(0.25, 0.75), **options)
    if kind == "dop_groups_tied":
        return Space.dop_groups(num_layers, num_visual_tokens, shares=(0.2, 0.3, 0.5), split=False, **options)
    return getattr(Space, kind)(num_layers, num_visual_tokens, **options)


KINDS = ("dop", "dop_split", "dop_full_kv", "dop_groups", "dop_groups_tied", "uniform")


def random_curves(space: Space, rng: np.random.Generator, monotone: bool) -> dict[str, np.ndarray]:
    """Divergence at each level, mostly 0 at full; heavy-tailed, with ties now and then."""
    curves = {}
    for parameter in space.parameters:
        values = rng.random(len(parameter.levels)) ** 3 * rng.choice([0.01, 0.3, 3.0])
        if rng.random() < 0.3:
            values = np.round(values, 1)
        if monotone:
            values = np.sort(values)[::-1]
        if rng.random() < 0.8:  # else: as around an anchor that is not full
            values[-1] = 0.0
        curves[parameter.name] = values
    return curves


def random_table(num_layers: int, counts: Sequence[TokenCounts], rng: np.random.Generator) -> LatencyTable:
    """Made-up layer times. Giving queries to part of the tokens may take longer than giving them to all."""
    text = sorted({min(c.text for c in counts), max(c.text for c in counts)})
    visual = [0, *sorted({max(1, max(c.visual for c in counts) // 2), max(c.visual for c in counts)})]
    lengths = sorted({min(c.total for c in counts), max(c.total for c in counts)})
    shares = (0.3, 0.6)[: int(rng.integers(0, 3))]
    grid = (len(text), len(visual))
    return LatencyTable(
        environment={},
        num_layers=num_layers,
        text=tuple(text),
        visual=tuple(visual),
        shares=shares,
        keys_ms=rng.random(grid),
        queries_ms=rng.random(grid) * [0, *[2] * (len(visual) - 1)],
        mlp_ms=rng.random(grid) * [0, *[2] * (len(visual) - 1)],
        queries_part_ms=4 * rng.random((*grid, len(shares))),
        mlp_part_ms=4 * rng.random((*grid, len(shares))),
        lengths=tuple(lengths),
        fixed_ms=rng.random(len(lengths)),
        full_ms=np.full(len(lengths), 10.0 * num_layers + 1),
    )


@st.composite
def problems(draw: st.DrawFn, max_points: int = 600) -> Problem:
    kind = draw(st.sampled_from(KINDS))
    num_layers = draw(st.integers(1, 6 if kind in ("dop", "uniform") else 4))
    num_tokens = draw(st.integers(1, 9))
    cost_kind = draw(st.sampled_from(["flops", "flops", "latency", "latency", "kv_cache"]))
    recurrent = None
    if cost_kind != "latency" and draw(st.booleans()):  # layers of two kinds, or of the other
        layers = tuple(sorted(draw(st.sets(st.integers(0, num_layers - 1), min_size=1))))
        sizes = (draw(st.sampled_from(size)) for size in ((3, 90), (1, 50), (0, 64), (1, 24)))
        recurrent = RecurrentDims(layers, *sizes)
    others = None
    if cost_kind != "latency" and draw(st.booleans()):  # another kind of those that attend
        layers = tuple(sorted(draw(st.sets(st.integers(0, num_layers - 1), min_size=1))))
        others = OtherHeads(layers, draw(st.sampled_from([1, 2])), draw(st.sampled_from([4, 32])), draw(st.booleans()))
    dims = ModelDims(
        num_layers=num_layers,
        hidden_size=draw(st.sampled_from([4, 16])),
        intermediate_size=draw(st.sampled_from([3, 40])),
        num_heads=4,
        num_kv_heads=draw(st.sampled_from([1, 4])),
        head_dim=draw(st.sampled_from([2, 16])),
        gated_mlp=draw(st.booleans()),
        gated_queries=draw(st.booleans()),
        recurrent=recurrent,
        other_heads=others,
    )
    counts = draw(
        st.lists(st.builds(TokenCounts, st.integers(1, 12), st.integers(0, num_tokens)), min_size=0, max_size=3)
    )
    counts.append(TokenCounts(draw(st.integers(1, 12)), num_tokens))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    space = make_space(kind, num_layers, num_tokens, min_visual_tokens=draw(st.integers(0, 1)))
    while space.num_assignments > max_points:  # fewer levels, chosen at random
        name = max(space.names, key=lambda n: len(space.parameter(n).levels))
        levels = space.parameter(name).levels
        space = space.with_levels({name: rng.choice(levels[:-1], len(levels) - 2, replace=False).tolist()})
    if cost_kind == "latency":
        model = CostModel(dims, counts, "latency", latency=random_table(num_layers, counts, rng))
    else:
        model = CostModel(dims, counts, kind=cost_kind)
    return Problem(space, model, Surrogate(space, random_curves(space, rng, monotone=draw(st.booleans()))))


def enumerate_plainly(problem: Problem) -> list[tuple[int, float, dict[str, int]]]:
    """(total cost, sum of the curves, assignment) of every point; knows nothing of dead operations."""
    surrogate = problem.surrogate
    assert surrogate is not None
    points = []
    for indices in itertools.product(*(range(len(p.levels)) for p in problem.space.parameters)):
        assignment = {p.name: p.levels[i] for p, i in zip(problem.space.parameters, indices, strict=True)}
        total = sum(float(surrogate.curves[p.name][i]) for p, i in zip(problem.space.parameters, indices, strict=True))
        points.append((problem.cost_model.total(problem.space.strategy(assignment)), total, assignment))
    return points


def plain_front(points: Sequence[tuple[int, float, dict[str, int]]]) -> list[tuple[int, float]]:
    """Undominated (cost, divergence), ascending in cost."""
    front: list[tuple[int, float]] = []
    for cost, divergence, _ in sorted(points, key=lambda point: point[:2]):
        if not front or divergence < front[-1][1]:
            front.append((cost, divergence))
    return front


def interacting_evaluator(space: Space, num_samples: int, seed: int = 0) -> Evaluator:
    """A made-up exact divergence: per-sample, non-negative, 0 for the empty strategy, not additive."""
    rng = np.random.default_rng(seed)
    difficulty = rng.gamma(2.0, 1.0, num_samples)
    weight = {"q": 0.02, "kv": 0.6, "mlp": 0.3}
    top = space.tokens.full

    def evaluate(strategies: Sequence[Strategy], samples: Sequence[int] | None) -> np.ndarray:
        chosen = np.arange(num_samples) if samples is None else np.asarray(samples)
        rows = []
        for strategy in strategies:
            runs = strategy.canonical().to_array().astype(float)
            full = Strategy.full(strategy.num_layers).canonical().to_array()[0].astype(float)
            lost = ((full[None] - runs) * full).mean(axis=0)
            loss = sum(w * lost[:, i].mean() ** 1.5 for i, w in enumerate(weight.values()))
            kept = top if strategy.num_visual_tokens is None else strategy.num_visual_tokens
            tokens = 0.4 * (np.log1p(top) - np.log1p(kept)) / np.log1p(top)
            total = loss + tokens + 0.8 * loss * tokens
            rows.append(difficulty[chosen] * total * (1 + 0.3 * np.sin(chosen + 10 * loss)))
        return np.array(rows).reshape(len(strategies), len(chosen))

    return evaluate


def counted(evaluator: Evaluator) -> tuple[Evaluator, list[int]]:
    """The evaluator and a list that grows by the sample evaluations of each call."""
    calls: list[int] = []

    def evaluate(strategies: Sequence[Strategy], samples: Sequence[int] | None) -> np.ndarray:
        values = evaluator(strategies, samples)
        calls.append(values.size)
        return values

    return evaluate, calls


POCKET_LIKE = ModelDims(num_layers=6, hidden_size=32, intermediate_size=88, num_heads=4, num_kv_heads=4, head_dim=8)


def pocket_problem(kind: str = "dop_split", num_tokens: int = 24, num_samples: int = 20) -> Problem:
    """A problem with an exact divergence, its curves measured."""
    from dop_search.search import Curves

    space = make_space(kind, POCKET_LIKE.num_layers, num_tokens)
    store = EvaluationStore(interacting_evaluator(space, num_samples), num_samples)
    surrogate = Curves.measure(space, store).surrogate(space)
    store = EvaluationStore(interacting_evaluator(space, num_samples), num_samples)
    counts = [TokenCounts(1 + i % 3, num_tokens) for i in range(num_samples)]
    return Problem(space, CostModel(POCKET_LIKE, counts), surrogate, store)
