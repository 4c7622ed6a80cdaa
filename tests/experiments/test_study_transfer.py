"""``experiment=transfer`` on a handful of samples: what moved fits its budget, and the same place is no move."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.small_studies import StudyRunner, check_that_a_rerun_measures_nothing
from support.tiny_families import tiny_processor
from support.tiny_models import tiny_model

from dop_search.search import Problem, Space
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget, CostModel
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.utils.errors import BudgetError, ConfigError
from experiments.transfer.study import moved

GIVEN = (
    "budget=[0.4,0.2]",
    "study.options.seeds=[1]",
    "study.options.num_candidates=2",
    "study.options.models=[pocket/stretched]",
)


def test_rows_fit_their_budgets_and_a_rerun_measures_nothing(run_small_study: StudyRunner, tmp_path: Path) -> None:
    result = run_small_study("transfer", *GIVEN)
    rows = {(row["target"], row["budget"], row["axis"]): row for row in result["rows"]}
    axes = {
        "pocket": {"target", "uniform", "model", "budget", "seed"},
        "pocket/stretched": {"target", "uniform", "model"},
    }
    assert set(rows) == {(name, budget, axis) for name in axes for budget in (0.4, 0.2) for axis in axes[name]}
    for (_, budget, axis), row in rows.items():
        assert row["flops_ratio"] <= budget
        assert row["flops_ratio"] > 0.9 * budget or "n_v=all" in row["strategy"], axis
        assert row["kl_ci95"][0] <= row["kl_heldout"] <= row["kl_ci95"][1]
    for budget, other in ((0.4, 0.2), (0.2, 0.4)):
        source, there = rows["pocket", other, "target"]["strategy"], rows["pocket", budget, "budget"]["strategy"]
        assert source.rsplit(" n_v", 1)[0] == there.rsplit(" n_v", 1)[0]  # the depths stay
    assert len(result["summary"]["moves"]) == 8
    same = {"to_target_ci95": [0.0, 0.0]}
    for move in result["summary"]["moves"]:
        row = rows[move["target"], move["budget"], move["axis"]]
        if row["strategy"] == rows[move["target"], move["budget"], "target"]["strategy"]:
            assert {"to_target_ci95": move["to_target_ci95"]} == same
    assert (tmp_path / "out" / "transfer.png").exists()
    check_that_a_rerun_measures_nothing(run_small_study, tmp_path, "transfer", *GIVEN)


@pytest.mark.slow
def test_between_sizes_of_a_family(run_small_study: StudyRunner, tmp_path: Path) -> None:
    """The command for Qwen2.5-VL, of 4 and of 6 layers: each is source and target."""
    for layers in (4, 6):
        tiny_model("qwen2_5_vl", layers, seed=layers).save_pretrained(tmp_path / f"{layers}")
        tiny_processor("qwen2_5_vl").save_pretrained(tmp_path / f"{layers}")
    pixels, lines = np.random.default_rng(0).integers(0, 255, (12, 24, 24, 3), dtype=np.uint8), []
    for index, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "question": "what is this?"}))
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    result = run_small_study(
        "transfer",
        "model=qwen2_5_vl_3b",
        "selector=divprune",
        f"model.name_or_path={tmp_path / '4'}",
        "model.dtype=float32",
        "data=jsonl",
        f"data.path={tmp_path / 'mine.jsonl'}",
        "data.num_test=0",
        "budget=[0.9]",
        "study.options.seeds=[]",
        f"study.options.models=[{tmp_path / '6'}]",
    )
    found = {(row["target"][-1], row["axis"]): row for row in result["rows"]}
    assert set(found) == {(layers, axis) for layers in "46" for axis in ("target", "uniform", "model")}
    assert all(row["flops_ratio"] <= 0.9 for row in found.values())


def test_moving_scales_depths_and_takes_the_most_tokens_that_fit() -> None:
    dims = ModelDims(
        num_layers=6, hidden_size=8, num_heads=2, num_kv_heads=2, head_dim=4, intermediate_size=16, gated_mlp=True
    )
    space = Space.dop_split(6, 40, selector="divprune")
    problem = Problem(space, CostModel(dims, [TokenCounts(4, 40)]))
    source = Strategy.depthwise(12, 4, 10, 2, num_visual_tokens=3)
    here = moved(source, problem, 0.3)
    assert here.depths() == {"q": (2,), "kv": (5,), "mlp": (1,)}
    assert here.selector == "divprune"
    assert here.num_visual_tokens is not None
    more = Strategy.depthwise(6, 2, 5, 1, num_visual_tokens=here.num_visual_tokens + 1)
    assert problem.cost_model.ratio(here) <= 0.3 < problem.cost_model.ratio(more)
    assert moved(source, problem, 0.9).num_visual_tokens is None
    with pytest.raises(BudgetError, match="the smallest feasible value"):
        moved(source, problem, Budget(flops_ratio=0.05).value)


def test_the_target_is_no_source(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match="names the configured model 'pocket'"):
        run_small_study("transfer", "study.options.models=[pocket]")
    with pytest.raises(ConfigError, match=r"configured data\.seed \(0\)"):
        run_small_study("transfer", "study.options.seeds=[0]")
