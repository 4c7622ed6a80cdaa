"""One study over selectors and spaces, on invented problems."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from invented_problems import counted, interacting_evaluator, pocket_problem

from dop_search.search import EvaluationStore, Option, Surrogate, additive_exact, joint_search, uniform_assignment
from dop_search.search.joint import filled
from dop_search.search.optuna_study import open_storage
from dop_search.strategy.cost import Budget
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


@pytest.mark.parametrize("kind", ["dop", "dop_split", "dop_groups"])
def test_filling_leaves_no_room_for_one_more_step(kind: str) -> None:
    problem = pocket_problem(kind)
    rng = np.random.default_rng(0)
    optimum = additive_exact(problem, BUDGET).assignment
    starts = [optimum, *({p.name: int(rng.choice(p.levels)) for p in problem.space.parameters} for _ in range(40))]
    for start in starts:
        if problem.cost_model.ratio(problem.space.strategy(start)) > 0.4:
            continue
        end = filled(problem, 0.4, start)
        assert problem.cost_model.ratio(problem.space.strategy(end)) <= 0.4
        for parameter in problem.space.parameters:
            assert end[parameter.name] >= start[parameter.name]
            above = [level for level in parameter.levels if level > end[parameter.name]]
            if above:
                more = problem.space.strategy({**end, parameter.name: above[0]})
                assert problem.cost_model.ratio(more) > 0.4


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
