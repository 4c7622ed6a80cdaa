"""``experiment=text_operations`` and ``vision_tower`` on a handful of samples."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import pytest
from support.small_studies import StudyRunner
from transformers import PreTrainedModel

from dop_search.strategy import Strategy
from dop_search.utils.errors import ConfigError
from experiments.text_operations.extension import Depths, Extension, pareto_depths

SMALL = ("study.options.num_levels=2", "study.options.num_candidates=3")


@pytest.mark.parametrize(("name", "num_curves"), [("text_operations", 6 * 2), ("vision_tower", 2 * 2)])
def test_both_sides_are_searched_at_equal_flops(
    run_small_study: StudyRunner, tmp_path: Path, name: str, num_curves: int
) -> None:
    result = run_small_study(name, *SMALL)
    curves = [row for row in result["rows"] if row["part"] == "curve"]
    assert len(curves) == num_curves
    assert all(row["flops_ratio"] < 1.0 for row in curves)
    # dead operations: nothing changes without the last layer's queries and MLPs
    if name == "text_operations":
        for row in curves:
            if row["depth"] == 11 and not row["parameter"].endswith("kv"):
                assert row["kl_search"] == pytest.approx(0.0, abs=1e-6)
    visual, both = (row for row in result["rows"] if row["part"] == "search")
    assert (visual["variant"], both["variant"]) == ("visual", "both")
    for row in (visual, both):
        assert row["budget"] == 0.3
        assert row["flops_ratio"] <= 0.3 * 1.0001
        assert row["kl_ci95"][0] <= row["kl_heldout"] <= row["kl_ci95"][1]
    assert set(visual["depths"].values()) == ({12} if name == "text_operations" else {5})
    assert both["kl_search"] <= visual["kl_search"] + 1e-9, "what is found without is among the candidates"
    assert [item["budget"] for item in result["summary"]["both_minus_visual"]] == [0.3]
    assert (tmp_path / "out" / f"{name}.png").exists()


class Invented(Extension):
    """Two parameters that cost what their depths are; nothing runs."""

    full: ClassVar[dict[str, int]] = {"a": 3, "b": 2}

    def ratio(self, strategy: Strategy, depths: Depths) -> float:
        return (depths["a"] + 2 * depths["b"]) / 7

    def decoder_ratio(self, ratio: float) -> float:
        return ratio

    def apply(self, model: PreTrainedModel, strategy: Strategy, depths: Depths) -> AbstractContextManager[Any]:
        raise NotImplementedError


def test_depths_that_others_beat_in_kl_and_flops_are_left_out() -> None:
    extension, strategy = Invented(), Strategy.full(2)
    curves = {"a": {0: 0.5, 1: 0.2, 2: 0.3, 3: 0.0}, "b": {0: 0.4, 1: 0.05, 2: 0.0}}
    everything = [
        (curves["a"][a] + curves["b"][b], extension.ratio(strategy, {"a": a, "b": b}), {"a": a, "b": b})
        for a in curves["a"]
        for b in curves["b"]
    ]
    best = [
        (added, depths)
        for added, ratio, depths in everything
        if not any((x <= added and y < ratio) or (x < added and y <= ratio) for x, y, _ in everything)
    ]
    found = pareto_depths(extension, curves, strategy)
    assert found == sorted(best, key=lambda item: item[0])
    assert 3 < len(found) < len(everything)


def test_one_level_is_refused(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match=r"study\.options\.num_levels: .*greater than or equal to 2, but got 1"):
        run_small_study("vision_tower", "study.options.num_levels=1")
