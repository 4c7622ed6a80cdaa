"""``experiment=additive_vs_exact`` on a handful of samples: the grid bounds every method, and runs are counted."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing

from dop_search.utils.errors import ConfigError

GIVEN = ("budget=[0.5,0.3]", "study.options.grids={dop:[4,3]}", "~study.options.grids.dop_split")


def test_no_method_beats_the_grid_and_every_run_is_counted(run_small_study: StudyRunner, tmp_path: Path) -> None:
    result = run_small_study("additive_vs_exact", *GIVEN)
    rows = {(row["method"], row["budget"]): row for row in result["rows"]}
    grid = rows["grid", None]
    points = list(zip(grid["cost_ratio"], grid["kl_search_of"], strict=True))
    for budget in (0.5, 0.3):
        exact = rows["exact", budget]
        within = [kl for cost, kl in points if cost <= budget]
        assert exact["kl_search"] == pytest.approx(min(within), rel=1e-3, abs=1e-9)
        assert exact["num_validation_runs"] == grid["num_strategies"]
        for method in ("additive", "rerank", "reanchored", "pair", "pairs"):
            row = rows[method, budget]
            assert row["flops_ratio"] <= budget
            assert row["kl_search"] >= exact["kl_search"]
            assert row["num_validation_runs"] <= grid["num_strategies"]
            assert row["kl_ci95"][0] <= row["kl_heldout"] <= row["kl_ci95"][1]
        first = rows["additive", budget]
        assert rows["rerank", budget]["kl_search"] <= first["kl_search"]
        assert rows["reanchored", budget]["kl_search"] <= first["kl_search"]
        assert first["num_validation_runs"] == 3 + 3 + 2  # the levels below full
        assert rows["pair", budget]["num_validation_runs"] > first["num_validation_runs"]
        assert {name for name, limit in rows if limit == budget and "accuracy" in rows[name, limit]} == {
            "additive",
            "exact",
        }
    gaps = {(gap["method"], gap["budget"]): gap for gap in result["summary"]["gaps"]}
    assert len(gaps) == 10
    assert all(gap["kl_search"] >= 0.0 for gap in gaps.values())
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"map.png", "optima.png"}

    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "additive_vs_exact", *GIVEN)


def test_other_grids_are_refused(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match=r"study\.options\.grids: .*two numbers of levels.*\(dop: \[4\]\)"):
        run_small_study("additive_vs_exact", "study.options.grids.dop=[4]")
