"""``experiment=solver`` on a handful of samples: runs are counted alone, answers fit, a better start never hurts."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing

from dop_search.utils.errors import ConfigError

NAMES = ("additive_exact", "rerank", "random", "tpe+warm")
GIVEN = (
    f"study.options.solvers=[{','.join(NAMES)}]",
    "study.options.num_trials=18",
    "study.options.seeds=[3]",
)


def test_every_solver_pays_for_its_own_runs(run_small_study: StudyRunner, tmp_path: Path) -> None:
    result = run_small_study("solver", *GIVEN)
    rows = {row["name"]: row for row in result["rows"]}
    assert list(rows) == list(NAMES)
    curves = rows["additive_exact"]["num_validation_runs"]
    for name, row in rows.items():
        assert row["flops_ratio"] <= 0.3
        assert row["seconds"] > 0.0
        assert row["kl_ci95"][0] <= row["kl_heldout"] <= row["kl_ci95"][1]
        if name != "additive_exact":
            assert curves < row["num_validation_runs"] <= curves + 18
            assert row["best_so_far"][-1][1] == pytest.approx(row["kl_search"], rel=1e-2, abs=1e-9)
    assert rows["rerank"]["kl_search"] <= rows["additive_exact"]["kl_search"]
    assert rows["tpe+warm"]["kl_search"] <= rows["rerank"]["kl_search"]
    assert (tmp_path / "out" / "solver.png").exists()

    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "solver", *GIVEN)


def test_other_solvers_and_several_budgets_are_refused(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match=r"unknown solver 'milp'; there are additive_exact"):
        run_small_study("solver", "study.options.solvers=[milp]")
    with pytest.raises(ConfigError, match=r"one budget, but got \[0.3, 0.2\]"):
        run_small_study("solver", "budget=[0.3,0.2]")
