"""One study over selectors and spaces, on invented problems."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from invented_problems import counted, interacting_evaluator, pocket_problem

from dop_search.baselines.base import FitContext
from dop_search.baselines.gsop import Gsop
from dop_search.search import (
    EvaluationStore,
    Option,
    Surrogate,
    additive_exact,
    gsop_option,
    gsop_search,
    joint_search,
    uniform_assignment,
)
from dop_search.search.options import TrajectorySpace, filled
from dop_search.search.optuna_study import open_storage
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.strategy.operations import TokenCounts
from dop_search.utils.errors import BudgetError

BUDGET = Budget(flops_ratio=0.4)


def option(selector: str, kind: str, factor: float = 1.0, budget: Budget = BUDGET) -> tuple[Option, list[int]]:
    """A space whose divergences are ``factor`` times those of the invented evaluator, and what was evaluated."""
    problem = pocket_problem(kind)
    space = replace(problem.space, strategy_fields={"selector": selector})
    made = interacting_evaluator(space, 20)
    evaluate, calls = counted(lambda strategies, samples: factor * made(strategies, samples))
    surrogate = problem.need_surrogate("test")
    curves = {name: factor * values for name, values in surrogate.curves.items()}
    problem = replace(
        problem,
        space=space,
        surrogate=Surrogate(space, curves),
        store=EvaluationStore(evaluate, 20),
    )
    return Option(selector, kind, problem, budget), calls


def test_the_best_of_all_that_any_option_proposes_wins_and_uses_up_its_budget() -> None:
    options = [option(s, kind, f)[0] for s, f in (("a", 1.0), ("b", 0.6)) for kind in ("dop", "dop_split")]
    found = joint_search(options, num_proposals=24)
    assert [item.kl_search for item in found] == sorted(item.kl_search for item in found)
    assert len({item.strategy.key() for item in found}) == len(found)
    assert found[0].strategy.selector == "b"
    best = min(
        float(its.problem.need_store("test").evaluate([its.problem.space.strategy(assignment)]).mean())
        for its in options
        for assignment in its.proposals(24, use_up=True)
    )
    assert found[0].kl_search == pytest.approx(best)
    for its in options:  # each one's optimum and its uniform reduction are there
        assert any(item.strategy.selector == its.selector for item in found)
        uniform = its.problem.space.strategy(uniform_assignment(its.problem, BUDGET) or {})
        assert uniform.key() in {item.strategy.key() for item in found}
    assert all(item.cost_ratio <= 0.4 for item in found)


def test_what_a_selector_computes_is_taken_off_its_limit_and_what_leaves_nothing_is_left_out() -> None:
    dear, _ = option("a", "dop_split", 0.1, Budget(flops_ratio=0.3))
    hopeless, calls = option("b", "dop_split", 0.01, Budget(flops_ratio=0.001))
    cheap, _ = option("c", "dop_split", 1.0)
    found = joint_search([dear, hopeless, cheap], num_proposals=12)
    assert calls == []
    for item in found:
        assert item.cost_ratio <= (0.3 if item.strategy.selector == "a" else 0.4)
    assert found[0].strategy.selector == "a"
    with pytest.raises(BudgetError, match="smallest"):
        joint_search([hopeless])


@pytest.mark.parametrize("per_token", [0.0, 1e-3])
@pytest.mark.parametrize("kind", ["dop", "dop_split", "dop_groups"])
def test_filling_leaves_no_room_for_one_more_step(kind: str, per_token: float) -> None:
    problem = pocket_problem(kind)
    given = Option("a", kind, problem, Budget(flops_ratio=0.39), 0, 0, lambda s: per_token * s.num_kept(24), 0.01)
    rng = np.random.default_rng(0)
    optimum = additive_exact(problem, BUDGET).assignment
    starts = [optimum, *({p.name: int(rng.choice(p.levels)) for p in problem.space.parameters} for _ in range(40))]
    for start in starts:
        fits = given.price(problem.space.strategy(start)) <= 0.4
        if not fits and problem.cost_model.ratio(problem.space.strategy(start)) > 0.4:
            continue
        end = filled(given, start)
        assert given.price(problem.space.strategy(end)) <= 0.4 + 1e-9
        for parameter in problem.space.parameters:
            assert end[parameter.name] >= start[parameter.name] or not fits
            above = [level for level in parameter.levels if level > end[parameter.name]]
            if above:
                more = problem.space.strategy({**end, parameter.name: above[0]})
                assert given.price(more) > 0.4


def test_what_a_selector_computes_for_more_tokens_never_exceeds_the_budget() -> None:
    """Twice what was expected where all tokens are kept, nothing for few."""
    plain = option("a", "dop_split")[0]
    priced = replace(plain, selection=lambda s: 0.04 * s.num_kept(24) / 24, expected=0.02)
    trajectory = gsop_option(priced, gsop_search(priced.problem))
    found = joint_search([priced, trajectory], num_proposals=24, num_sampled=10)
    assert all(priced.price(item.strategy) <= 0.42 + 1e-9 for item in found)
    assert any(priced.price(item.strategy) > 0.41 for item in found)
    assert {len(item.strategy.groups) for item in found} == {1, 2}, "of both spaces"


def test_sampled_trials_choose_selector_and_space_and_never_make_it_worse(tmp_path: Path) -> None:
    pairs = [option(s, kind, f) for s, f in (("a", 1.0), ("b", 0.9)) for kind in ("dop", "dop_split")]
    options, where = [its for its, _ in pairs], tmp_path / "study.journal"
    asked = joint_search(options, 10, storage=where, study_name="s")
    more = joint_search(options, 10, num_sampled=30, storage=where, study_name="s")
    assert more[0].kl_search <= asked[0].kl_search
    import optuna

    study = optuna.load_study(study_name="s", storage=open_storage(where))
    sampled = [trial for trial in study.trials if "warm_start" not in trial.user_attrs]
    assert len(sampled) == 30
    assert {trial.params["selector"] for trial in sampled} == {"a", "b"}
    assert {trial.params["space"] for trial in sampled} == {"dop", "dop_split"}
    before = [sum(calls) for _, calls in pairs]
    again = joint_search(options, 10, num_sampled=30, storage=where, study_name="s")
    assert [item.strategy for item in again] == [item.strategy for item in more]
    assert [sum(calls) for _, calls in pairs] == before, "a finished study measures nothing"


@pytest.mark.parametrize("ratio", [0.7, 0.4, 0.25])
def test_gsops_points_are_proposed_with_all_the_tokens_that_fit_and_its_own_choice_is_among_them(ratio: float) -> None:
    budget = Budget(flops_ratio=ratio)
    plain = option("a", "dop_split", budget=budget)[0]
    problem, search = plain.problem, gsop_search(plain.problem)
    made = gsop_option(plain, search)
    space, cost = made.problem.space, made.problem.cost_model
    assert isinstance(space, TrajectorySpace)
    proposed = [space.strategy(its) for its in made.proposals(99, use_up=True)]
    most = {}  # by brute force: what fits beside each point
    for point in search.points:
        fits = [n for n in range(1, 25) if cost.ratio(replace(point.strategy, num_visual_tokens=n)) <= ratio]
        if fits and fits[-1] not in most:
            most[fits[-1]] = replace(point.strategy, num_visual_tokens=None if fits[-1] == 24 else fits[-1])
    assert {strategy.key() for strategy in proposed} == {strategy.key() for strategy in most.values()}
    for tokens in range(1, 25):
        expected = next(s for n, s in most.items() if n >= tokens)
        found = space.strategy({"num_visual_tokens": tokens})
        assert (found.groups, found.num_kept(24)) == (expected.groups, tokens)
        assert cost.ratio(found) <= ratio
    counts = tuple(TokenCounts(1 + i % 3, 24) for i in range(20))  # as in pocket_problem
    store = problem.need_store("test")
    context = FitContext(
        cost.dims, counts, lambda its: store.evaluate(its).mean(axis=1), selector="random"
    )  # costs nothing
    theirs = Gsop().fit(context, ratio).needs_strategy()  # entered with as many tokens as are nearest to the budget
    assert any(s.groups == theirs.groups and s.num_kept(24) <= theirs.num_kept(24) for s in proposed[:2])
    found = joint_search([option("a", "dop_split", budget=budget)[0], made], num_proposals=24)
    assert found[0].num_validation_runs >= search.num_evaluations
    assert {strategy.key() for strategy in proposed[:2]} <= {item.strategy.key() for item in found}


def test_a_separate_draw_decides_among_the_finalists_and_nothing_else() -> None:
    its, _ = option("a", "dop_split")
    plain = joint_search([its], num_proposals=12)
    asked: list[list[str]] = []

    def the_other_way_round(strategies: Sequence[Strategy]) -> np.ndarray:
        asked.append([strategy.key() for strategy in strategies])
        return np.array([[1.0 / (1 + place)] * 3 for place in range(len(strategies))])

    found = joint_search([its], num_proposals=12, decide=the_other_way_round, num_finalists=4)
    keys = [item.strategy.key() for item in plain]
    assert asked == [keys[:4]]
    assert [item.strategy.key() for item in found] == [*reversed(keys[:4]), *keys[4:]]
    assert [item.kl_decision for item in found[:5]] == [0.25, pytest.approx(1 / 3), 0.5, 1.0, None]
    assert found[0].history == plain[0].history
