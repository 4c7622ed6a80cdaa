"""``experiment=split_attention`` on a handful of samples: same search for every variant, differences are paired."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing

from dop_search.app.results import ResultFile
from dop_search.utils.errors import ConfigError

GIVEN = ("budget=[0.3]", "study.options.shares=[[1.0],[0.25,0.75]]")


def test_variants_differ_in_freedom_and_are_compared_in_pairs(run_small_study: StudyRunner, tmp_path: Path) -> None:
    result = run_small_study("split_attention", *GIVEN)
    rows = {(row["groups"], row["split"]): row for row in result["rows"]}
    assert {key: row["num_parameters"] for key, row in rows.items()} == {
        (1, False): 3,
        (1, True): 4,
        (2, False): 5,
        (2, True): 7,
    }
    for row in rows.values():
        assert row["flops_ratio"] <= 0.3
        assert row["kl_ci95"][0] <= row["kl_heldout"] <= row["kl_ci95"][1]
    for groups in (1, 2):
        assert rows[groups, True]["num_validation_runs"] > rows[groups, False]["num_validation_runs"]
    results = ResultFile(tmp_path / "out", "split_attention", result["setup"])
    tied, free = (results.per_sample({"groups": 2, "split": split, "budget": 0.3}) for split in (False, True))
    assert tied is not None
    assert free is not None
    found = result["summary"]["split_minus_tied"][1]
    assert found["difference"] == pytest.approx(float(np.mean(free - tied)))
    assert found["ci95"][0] <= found["difference"] <= found["ci95"][1]
    assert [item["split"] for item in result["summary"]["groups_minus_one"]] == [False, True]
    assert (tmp_path / "out" / "split_attention.png").exists()

    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "split_attention", *GIVEN)


def test_two_entries_with_as_many_groups_are_refused(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match="different numbers of groups"):
        run_small_study("split_attention", "study.options.shares=[[0.5,0.5],[0.25,0.75]]")
