"""Lost answers are counted by family, and the pictures show what was kept."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing

from dop_search.data import validation
from dop_search.utils.errors import ConfigError
from experiments.failures.study import _of_different_families


def test_counts_pictures_figures_and_a_rerun(run_small_study: StudyRunner, tmp_path: Path) -> None:
    given = ("budget=[0.11]", "space.num_depth_levels=2", "space.num_token_levels=2", "data.num_test=8")
    given += ("data.families=[chart,read]", "study.options.num_pictures=2")
    result = run_small_study("failures", *given)
    assert [row["method"] for row in result["rows"]] == ["found", "uniform"]
    uniform = result["rows"][1]
    assert uniform["num_lost"] > 0, "a tenth of the FLOPs must cost charts or signs an answer"
    for row in result["rows"]:
        assert sum(row["lost"].values()) == row["num_lost"]
        assert sum(row["asked"].values()) == row["num_full_right"] <= row["num_test"] == 8
        assert all(row["lost"][family] <= row["asked"][family] for family in ("chart", "read"))
        assert len(row["pictures"]) == min(2, row["num_lost"])
    samples = {s.id: s for s in validation.validation_set("pocket", 8, 0, "test", families=["chart", "read"])}
    picture = uniform["pictures"][0]
    image = Image.open(io.BytesIO(base64.b64decode(picture["png"])))
    assert np.array_equal(np.asarray(image), np.asarray(samples[picture["id"]].image))
    assert picture["full"].strip().lower() == samples[picture["id"]].answers[0].lower() != picture["pruned"].lower()
    num_kept = int(uniform["strategy"].split("n_v=")[1])
    assert len(set(picture["kept"])) == num_kept
    assert max(picture["kept"]) < picture["grid"][0] * picture["grid"][1]
    assert (tmp_path / "out" / "by_family.png").exists()
    assert (tmp_path / "out" / "pictures.png").exists()
    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "failures", *given)
    with pytest.raises(ConfigError, match=r"num_pictures: .*greater than or equal to 0, but got -1"):
        run_small_study("failures", *given, "study.options.num_pictures=-1", f"study.folder={tmp_path / 'none'}")


def test_pictures_go_round_the_families() -> None:
    class Asked:
        def __init__(self, family: str) -> None:
            self.family = family

    samples = [Asked(family) for family in "aabbc"]
    assert _of_different_families(samples, np.arange(5), 4) == [0, 2, 4, 1]  # type: ignore[arg-type]
