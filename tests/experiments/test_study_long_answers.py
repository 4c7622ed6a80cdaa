"""``experiment=long_answers`` on a handful of samples: positions, thirds, the full model, a rerun that is none."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing

from dop_search.utils.errors import ConfigError, DataError
from experiments.long_answers.study import by_position, first_other_token, long_enough

GIVEN = ("study.options.num_candidates=2",)


def test_lists_by_position_and_a_rerun_that_measures_nothing(run_small_study: StudyRunner, tmp_path: Path) -> None:
    result = run_small_study("long_answers_lists", *GIVEN)
    rows = {(row["strategy"], row["budget"]): row for row in result["rows"]}
    assert set(rows) == {("uniform", 0.3), ("found", 0.3), ("found_long", 0.3), ("kv", 1.0), ("q", 1.0), ("mlp", 1.0)}
    for (_, budget), row in rows.items():
        assert row["flops_ratio"] <= budget
        assert row["position"] == list(range(0, 4 * len(row["position"]), 4))
        assert len(row["position"]) >= 3  # answers of 12 tokens and more
        assert row["num_samples"][0] == 3
        assert min(row["mean"]) >= 0.0
        same = row["generated"]["same_so_far"]
        assert all(late <= early for early, late in pairwise([1.0, *same]))
        assert same[-1] >= row["generated"]["same"]
        assert row["generated"]["right_full"] >= 0.5
    assert rows["kv", 1.0]["strategy_text"].startswith("q≤9 kv≤10 mlp≤9")  # after the last key nothing matters
    full = result["summary"]["full"]
    assert full["longest"] >= 12
    assert full["num_answers"] == 3
    assert min(full["accuracy"]["mean"]) > 0.5  # the bundled model lists objects well
    assert set(result["summary"]["differences"]["0.3"]) == {
        "found - uniform",
        "found_long - uniform",
        "found_long - found",
    }
    assert (tmp_path / "out" / "long_answers.png").exists()
    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "long_answers_lists", *GIVEN)


def test_answers_of_64_tokens_and_more(run_small_study: StudyRunner) -> None:
    result = run_small_study("long_answers", *GIVEN, "data.num_heldout=2")
    for row in result["rows"]:
        assert row["position"][-1] >= 60
        assert row["generated"]["position"][-1] >= 60
    full = result["summary"]["full"]
    assert full["longest"] >= 81
    assert min(full["accuracy"]["mean"]) > 0.5


def test_the_first_other_token() -> None:
    assert first_other_token([5, 6, 7, 0], [5, 6, 7]) == float("inf")  # padding after the end
    assert first_other_token([5, 9, 7], [5, 6, 7]) == 1
    assert first_other_token([5, 6], [5, 6, 7]) == 2


def test_bins_thirds_and_samples_that_end_early() -> None:
    grows = [np.arange(length, dtype=np.float64) for length in (6, 6, 6, 6, 9)]
    found = by_position(grows, bin_tokens=3)
    assert found["position"] == [0, 3]  # one of five reaches the third bin
    assert found["mean"] == [1.0, 4.0]
    assert found["num_samples"] == [5, 5]
    assert found["early_middle_late"].tolist() == pytest.approx([0.6, 2.8, 5.0])
    assert found["late_minus_early_ci95"][0] > 0.0


def test_options_and_too_short_answers_are_refused(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match=r"min_answer_tokens: .*greater than or equal to 3, but got 2"):
        run_small_study("long_answers", "study.options.min_answer_tokens=2")
    with pytest.raises(ConfigError, match=r"cut_ratios.kv: .*less than or equal to 1, but got 1.5"):
        run_small_study("long_answers", "study.options.cut_ratios={kv: 1.5}")
    short = SimpleNamespace(samples=[SimpleNamespace(answer_ids=(1,) * 5)])
    with pytest.raises(DataError, match="no answer of the full model has 9 tokens, the longest has 5"):
        long_enough(short, 9)  # type: ignore[arg-type]
