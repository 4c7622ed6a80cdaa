"""What can be served, and the line that ``dop-serve`` prints."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dop_search.app.cli import serve
from dop_search.selectors import SELECTORS, make_selector
from dop_search.serving.servable import check_servable, serve_command
from dop_search.strategy import Strategy
from dop_search.utils.errors import StrategyError


def depthwise(kv: int | list[int] = 12, **fields: Any) -> Strategy:
    return Strategy.depthwise(12, q=5, kv=kv, mlp=2, **fields)


@pytest.mark.parametrize(
    ("strategy", "options", "reason"),
    [
        (depthwise(), {"num_layers": 32}, "is for 12 decoder layers, but the model has 32"),
        (depthwise(num_visual_tokens=0), {}, "num_visual_tokens >= 1"),
        (depthwise(kv=11), {"prefix_caching": True}, "--no-enable-prefix-caching"),
        (
            depthwise(num_visual_tokens=9, selector="cdpruner"),
            {},
            "'cdpruner' cannot be served: it reads the prompt's text",
        ),
        (
            depthwise(num_visual_tokens=9, selector="tome"),
            {},
            "'tome' cannot be served: it changes what the vision tower computes",
        ),
        (depthwise(num_visual_tokens=9, selector="avg_pool"), {}, "'avg_pool' cannot be served: it merges tokens"),
        (depthwise(num_visual_tokens=9, selector="hiprune"), {}, "needs global_attention@middle of the vision tower"),
        (depthwise(selector="text_attention", selector_options={"stages": [2]}), {}, "ranks inside the decoder"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(strategy: Strategy, options: dict[str, Any], reason: str) -> None:
    with pytest.raises(StrategyError, match=reason):
        check_servable(strategy, **options)


def test_the_remedy_names_selectors_that_are_served() -> None:
    with pytest.raises(StrategyError) as error:
        check_servable(depthwise(num_visual_tokens=9, selector="cdpruner"))
    named = str(error.value).rpartition("selector=one of ")[2].split(", ")
    assert {"cls_attention", "divprune", "vispruner"} <= set(named) <= set(SELECTORS)
    for name in named:
        assert check_servable(depthwise(selector=name)) == make_selector(name)


def test_what_a_tower_does_not_show_is_refused() -> None:
    few = depthwise(selector="cls_attention", num_visual_tokens=9)
    with pytest.raises(StrategyError, match=r"needs cls_attention of the vision tower.*selector=one of divprune"):
        check_servable(few, model_type="qwen2_5_vl")
    check_servable(depthwise(selector="cls_attention"), model_type="qwen2_5_vl")  # which ranks nothing


def test_keys_to_the_last_layer_keep_prefix_caching() -> None:
    check_servable(depthwise(kv=12, num_visual_tokens=64), num_layers=12, prefix_caching=True)
    check_servable(depthwise(kv=11), num_layers=12, prefix_caching=False)


def test_several_images_need_a_strategy_that_counts_them(tmp_path: Path) -> None:
    """Kept tokens and groups of a sample's images together are not known from one image."""
    limited = {}
    for name, strategy in {
        "all": depthwise(),
        "count": depthwise(num_visual_tokens=9),
        "groups": depthwise([12, 10], shares=[0.5, 0.5]),
        "count_per_image": depthwise(num_visual_tokens=9, per_image=True),
        "groups_per_image": depthwise([12, 10], shares=[0.5, 0.5], per_image=True),
    }.items():
        replace(strategy, model_fingerprint="llava-0").save(tmp_path / "strategy.json")
        limited[name] = "--limit-mm-per-prompt" in serve_command("a model", tmp_path / "strategy.json")
    assert limited == {"all": False, "count": True, "groups": True, "count_per_image": False, "groups_per_image": False}


def test_the_command_prints_the_line_for_every_strategy_of_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    depthwise(kv=11, num_visual_tokens=64, provenance={"model": "pocket"}).save(tmp_path / "strategy-30.json")
    depthwise(provenance={"model": "me/my model"}, model_fingerprint="llava_next-0").save(tmp_path / "strategy-50.json")
    assert serve.main([str(tmp_path)]) == 0
    first, second = (shlex.split(line) for line in capsys.readouterr().out.splitlines())
    assert json.loads(first[first.index("--hf-overrides") + 1]) == {
        "architectures": ["DopLlavaForConditionalGeneration"],
        "dop_strategy": str(tmp_path / "strategy-30.json"),
    }
    assert (Path(first[first.index("--model") + 1]) / "config.json").is_file()
    assert json.loads(second[second.index("--hf-overrides") + 1])["architectures"] == [
        "DopLlavaNextForConditionalGeneration"
    ]
    assert "--no-enable-prefix-caching" in first
    assert "--no-enable-prefix-caching" not in second
    assert second[second.index("--model") + 1] == "me/my model"


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert serve.main([str(tmp_path)]) == 1
    assert "has no strategy-*.json" in capsys.readouterr().err
    depthwise().save(tmp_path / "mine.json")
    assert serve.main([str(tmp_path / "mine.json"), "--model", "me/mine"]) == 1
    assert "`model_fingerprint`" in capsys.readouterr().err
    depthwise(model_fingerprint="internvl-0").save(tmp_path / "theirs.json")
    assert serve.main([str(tmp_path / "theirs.json"), "--model", "me/mine"]) == 1
    assert "'internvl' are not served, only llava, llava_next" in capsys.readouterr().err
    assert serve.main([str(tmp_path / "mine.json")]) == 1
    assert "add --model" in capsys.readouterr().err
