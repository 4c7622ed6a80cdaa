"""Objectives are what they are called, and the study ranks them by what happens on new samples."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing, study_config

from dop_search.app.workbench import Workbench
from dop_search.evaluation.accuracy import correct_answers
from dop_search.models.loading import load
from dop_search.strategy import Strategy
from dop_search.utils.errors import ConfigError
from dop_search.utils.progress import Progress
from experiments.objective.study import MEASURED, PARTS, _parts, distances, score, summarize

SMALL_GRID = ("space.num_depth_levels=2", "space.num_token_levels=2")


def test_distances_by_their_definitions() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]).double(), torch.tensor([0.3, 0.6, 0.1]).double()
    values = dict(zip(MEASURED, distances(p.log()[None], q.log()[None])[0].tolist(), strict=True))
    m = (p + q) / 2
    assert values["kl"] == pytest.approx(float((p * (p / q).log()).sum()))
    assert values["reverse_kl"] == pytest.approx(float((q * (q / p).log()).sum()))
    assert values["js"] == pytest.approx(float((p * (p / m).log() + q * (q / m).log()).sum() / 2))
    assert values["changed"] == 1.0
    assert values["logit_mse"] == pytest.approx(float((p.log() - q.log()).var(correction=0)))
    logits = torch.randn(4, 7)
    same = distances(logits.log_softmax(-1), (logits + 3.0).log_softmax(-1))
    torch.testing.assert_close(same, torch.zeros_like(same), atol=1e-6, rtol=0.0)


def test_robust_means_and_the_worst_family() -> None:
    values = np.zeros((1, 10, len(PARTS)))
    values[0, :, 0] = [0.01] * 8 + [0.04, 4.0]
    scores = {name: float(item[0]) for name, item in score(values, np.array(["a"] * 9 + ["b"])).items()}
    assert scores["kl"] == pytest.approx(0.412)
    assert scores["root_kl"] == pytest.approx((0.8 + 0.2 + 2.0) / 10)
    assert scores["trimmed_kl"] == pytest.approx(0.12 / 9)
    assert scores["clipped_kl"] == pytest.approx(0.112)
    assert scores["worst_family_kl"] == pytest.approx(4.0)


@pytest.mark.slow
def test_a_perfect_objective_correlates_fully_and_noise_does_not() -> None:
    rng = np.random.default_rng(0)
    quality = np.tile(np.linspace(0.1, 3.0, 12), 2)
    budgets = np.repeat([0.3, 0.15], 12)
    search = np.zeros((24, 40, len(PARTS)))
    search[:, :, 0] = quality[:, None]
    search[:, :, 1] = rng.random((24, 1))
    heldout = quality[:, None] + rng.random(50) * 0.01
    wrong = (rng.random(300) < quality[:, None] / 4).astype(float)
    summary = summarize(budgets, search, heldout, wrong, np.array(["a"] * 40))
    assert summary["kl"]["kl"]["spearman"] == pytest.approx(1.0)
    assert summary["kl"]["accuracy"]["spearman"] > 0.9
    assert abs(summary["reverse_kl"]["kl"]["spearman"]) < 0.6
    assert summary["reverse_kl"]["kl"]["minus_kl_ci95"][1] < 0.0
    assert summary["js"]["kl"]["spearman"] == 0.0, "a constant objective predicts nothing"
    assert summary["kl"]["chosen"]["0.3"]["kl_heldout"] == pytest.approx(0.1, abs=0.01)


@pytest.mark.slow
def test_kl_and_right_answers_are_those_measured_otherwise(tmp_path: Path) -> None:
    bench = Workbench(study_config("objective", tmp_path, *SMALL_GRID), load("pocket"), Progress())
    strategies = [Strategy.full(12), Strategy.depthwise(12, 3, 8, 2, num_visual_tokens=8)]
    parts = _parts(bench, strategies, "test")
    kl = bench.divergence(strategies, "test")
    np.testing.assert_allclose(parts[:, :, PARTS.index("kl")], kl, rtol=2e-3, atol=2e-5)
    np.testing.assert_allclose(parts[0, :, : len(MEASURED)], 0.0, atol=1e-6)
    full = correct_answers(bench.full_answers(), bench.data("test").samples)
    np.testing.assert_array_equal(bench.correct(), full)
    for strategy, wrong in zip(strategies, parts[:, :, PARTS.index("wrong")], strict=True):
        np.testing.assert_array_equal(wrong == 0.0, bench.correct(strategy) & full)


def test_rows_figure_and_a_rerun(run_small_study: StudyRunner, tmp_path: Path) -> None:
    given = (*SMALL_GRID, "study.options.num_good=2", "study.options.num_random=2")
    result = run_small_study("objective", *given)
    assert [row["candidate"] for row in result["rows"]] == ["good 0", "good 1", "random 0", "random 1"]
    assert len({row["strategy"] for row in result["rows"]}) == 4
    assert all(0.0 <= row["accuracy"] <= 1.0 and row["objective"]["kl"] >= 0.0 for row in result["rows"])
    best = min(result["rows"], key=lambda row: row["objective"]["kl"])
    chosen = result["summary"]["kl"]["chosen"]["0.3"]
    assert chosen["kl_heldout"] == pytest.approx(best["kl_heldout"], rel=1e-3)
    assert (tmp_path / "out" / "objective.png").exists()
    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "objective", *given)
    few = ("study.options.num_good=1", "study.options.num_random=0", f"study.folder={tmp_path / 'few'}")
    with pytest.raises(ConfigError, match=r"num_good=1, num_random=0"):
        run_small_study("objective", *SMALL_GRID, *few)
