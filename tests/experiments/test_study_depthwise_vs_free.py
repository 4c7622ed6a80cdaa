"""``experiment=depthwise_vs_free`` on a handful of samples: ablations agree, freedom is paid for in equal runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing

from dop_search.utils.errors import ConfigError
from experiments.depthwise_vs_free.study import MOVES

NUM_RUNS = 6


def test_ablations_agree_and_searches_stay_within_their_runs(run_small_study: StudyRunner, tmp_path: Path) -> None:
    given = (f"study.options.num_runs={NUM_RUNS}", "data.num_samples=3")
    result = run_small_study("depthwise_vs_free", *given)
    rows = {(row["kind"], row["name"]): row for row in result["rows"]}
    for module in ("q", "kv", "mlp"):
        single, end, start = (rows[kind, module] for kind in ("single", "from_end", "from_start"))
        assert end["kl_search"][-1] == pytest.approx(single["kl_search"][-1])
        assert start["kl_search"][0] == pytest.approx(single["kl_search"][0])
        assert end["kl_search"][0] == pytest.approx(start["kl_search"][-1])  # nothing runs
        assert single["dead"] == ([] if module == "kv" else [11])
    first = rows["search", "start"]
    for name in ("start", *MOVES, "gsop"):
        row = rows["search", name]
        assert row["flops_ratio"] == pytest.approx(0.3, rel=0.03)
        if name in MOVES:
            assert row["kl_search"] <= first["kl_search"]
            assert row["num_validation_runs"] == first["num_validation_runs"] + NUM_RUNS
            assert row["best_so_far"] == sorted(row["best_so_far"], reverse=True)
            assert row["best_so_far"][-1] == pytest.approx(row["kl_search"], rel=1e-3, abs=1e-9)
    assert {item["name"] for item in result["summary"]["differences"]} == {"start", "window", "free", "gsop"}
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"ablation.png", "layer_sets.png"}

    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "depthwise_vs_free", *given)


def test_moves_change_what_they_say() -> None:
    runs = np.zeros((5, 3), dtype=np.bool_)
    runs[:3] = True
    exits = list(MOVES["exit"](runs))
    assert sorted(int(moved.sum()) for moved in exits) == [8, 8, 8, 10, 10, 10]
    windows = {tuple(np.flatnonzero(moved[:, 0])) for moved in MOVES["window"](runs)}
    assert windows == {(0, 1, 2), (1, 2), (0, 1), (0, 1, 2, 3)}
    free = list(MOVES["free"](runs))
    assert len(free) == 15
    assert all((moved != runs).sum() == 1 for moved in free)


def test_a_search_without_runs_is_refused(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match=r"study\.options\.num_runs: .*greater than 0, but got 0"):
        run_small_study("depthwise_vs_free", "study.options.num_runs=0")
