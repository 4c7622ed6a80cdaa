"""``experiment=selectors`` on a handful of samples: equal FLOPs, reasons, a figure, a rerun that measures nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing

from dop_search.utils.errors import ConfigError
from experiments.selectors.study import variance_shares

GIVEN = ("study.options.names=[cls_attention,tome,trim]", "study.options.num_candidates=2")


def test_rows_reasons_figure_and_a_rerun_that_measures_nothing(run_small_study: StudyRunner, tmp_path: Path) -> None:
    result = run_small_study("selectors", *GIVEN)
    rows = {(row["selector"], row["operations"]): row for row in result["rows"]}
    assert len(rows) == 6
    for name in ("cls_attention", "tome"):
        for operations in ("uniform", "found"):
            row = rows[name, operations]
            assert row["flops_ratio"] <= 0.3 * 1.01
            assert row["kl_ci95"][0] <= row["kl_heldout"] <= row["kl_ci95"][1]
        assert "q≤12 kv≤12 mlp≤12" in rows[name, "uniform"]["strategy"]
    assert "text encoder" in rows["trim", "found"]["infeasible"]
    at = result["summary"]["0.3"]
    assert set(at["differences"]) == {"cls_attention", "tome"}
    assert sum(at["shares"].values()) == pytest.approx(1.0)
    assert at["steps"]["start"]["difference_ci95"] == [0.0, 0.0]
    assert at["steps"]["operations"]["kl_heldout"] == rows["cls_attention", "found"]["kl_heldout"]
    chosen = min(("cls_attention", "tome"), key=lambda name: rows[name, "uniform"]["kl_search"])
    assert at["steps"]["selector"]["selector"] == chosen
    assert (tmp_path / "out" / "selectors.png").exists()
    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "selectors", *GIVEN)


def test_variance_is_shared_among_selector_operations_and_interaction() -> None:
    selector, operations = np.array([1.0, 2.0, 6.0])[:, None], np.array([0.0, 3.0])[None]
    shares = variance_shares(selector + operations)
    assert shares["interaction"] == pytest.approx(0.0, abs=1e-12)
    assert shares["selector"] == pytest.approx(14 * 2 / (14 * 2 + 4.5 * 3))
    crossed = variance_shares(np.array([[0.0, 1.0], [1.0, 0.0]]))
    assert crossed == pytest.approx({"selector": 0.0, "operations": 0.0, "interaction": 1.0})


def test_unknown_names_are_refused(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match="unknown selector 'divprun'"):
        run_small_study("selectors", "study.options.names=[divprun]")
    with pytest.raises(ConfigError, match=r"study\.options\.space: must be one of dop, dop_split.*got 'uniform'"):
        run_small_study("selectors", "study.options.space=uniform")
