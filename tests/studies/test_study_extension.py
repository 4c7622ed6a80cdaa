"""``experiment=text_operations`` and ``vision_tower`` on a handful of samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from small_studies import StudyRunner

from dop_search.errors import ConfigError

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
    assert visual["variant"], both["variant"] == ("visual", "both")
    for row in (visual, both):
        assert row["flops_ratio"] <= row["budget"] == 0.3
        assert row["kl_ci95"][0] <= row["kl_heldout"] <= row["kl_ci95"][1]
    assert set(visual["depths"].values()) == ({12} if name == "text_operations" else {5})
    assert both["kl_search"] <= visual["kl_search"] + 1e-9, "what is found without is among the candidates"
    assert [item["budget"] for item in result["summary"]["both_minus_visual"]] == [0.3]
    assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000


def test_one_level_is_refused(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match="num_levels >= 2"):
        run_small_study("vision_tower", "study.options.num_levels=1")
