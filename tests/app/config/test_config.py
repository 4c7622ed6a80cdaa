"""Every config composes, every mistake is named, and the tree round-trips."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from dop_search.app.cli.hydra_command import check_choices
from dop_search.app.config import (
    SearchConfig,
    parse_config,
)
from dop_search.app.config.solvers import ExactOptunaConfig, JointConfig
from dop_search.baselines import OWN
from dop_search.baselines.space_search import SpaceSearch
from dop_search.strategy.cost import Budget
from dop_search.utils.conf import CONFIG_NAME, config_dir
from dop_search.utils.errors import ConfigError

GROUPS = ("model", "data", "selector", "space", "search", "eval", "tracking")
CHOICES = [[f"{group}={path.stem}" for path in sorted((config_dir() / group).glob("*.yaml"))] for group in GROUPS]
NEEDED = {"data=jsonl": ("data.path=mine.jsonl",), "search=own": ("search.solver=rerank",)}
EXPERIMENTS = sorted((config_dir() / "experiment").glob("*.yaml"))


@pytest.fixture(autouse=True, scope="module")
def _hydra() -> Iterator[None]:
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield


def composed(*overrides: str) -> SearchConfig:
    return parse_config(compose(CONFIG_NAME, list(overrides)))


def error_of(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        composed(*overrides)
    return str(caught.value)


def test_no_arguments_is_the_main_job_and_equals_the_pydantic_defaults() -> None:
    config = composed()
    assert (config.model.name_or_path, config.data.name) == ("pocket", "pocket")
    assert (config.selector.name, config.space.name) == ("divprune_lazy", "dop_split")
    assert isinstance(config.search, JointConfig)
    assert [budget.plain for budget in config.budget] == [0.5, 0.3, 0.15]
    assert config == SearchConfig.model_validate({"model": {"dtype": "float32"}})
    assert composed("experiment=main") == config


@pytest.mark.parametrize("choices", zip_longest(*CHOICES), ids=lambda choices: choices[0])
@pytest.mark.fast_cases(5)
def test_every_option_composes_and_round_trips(choices: tuple[str | None, ...]) -> None:
    """The first option of each group together, then the second, …"""
    given = [choice for choice in choices if choice is not None]
    config = composed(*given, *(override for choice in given for override in NEEDED.get(choice, ())))
    assert SearchConfig.model_validate(config.model_dump(mode="json")) == config


def test_the_command_alone_is_the_method_dop_search() -> None:
    config, method = composed(), OWN["dop_search"]
    assert isinstance(method, SpaceSearch)
    assert isinstance(config.search, JointConfig)
    assert (config.selector.name, *config.selector.also) == method.selectors
    assert (config.space.name, *config.space.also) == method.spaces
    assert (config.search.num_proposals, config.search.num_sampled) == (method.num_proposals, method.num_sampled)


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
@pytest.mark.fast_cases(5)
def test_every_experiment_composes_and_opens_with_its_command(path: Path) -> None:
    composed(f"experiment={path.stem}")
    lines = path.read_text().splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[2] == f"#   dop-search experiment={path.stem}"
    assert len(" ".join(line for line in lines[3:] if line.startswith("# "))) > 60  # what it should show


@pytest.mark.slow
def test_models_without_a_cls_token_bring_a_selector_that_works_there() -> None:
    with_cls = ("llava_1_5", "llava_next", "internvl", "vipllava", "pocket", "smol_llava")
    for path in (config_dir() / "model").glob("*.yaml"):
        asked = ("vispruner",) if path.stem.startswith(with_cls) else ("received_attention",)
        assert composed(f"model={path.stem}").selector.also == asked, path.stem
    assert composed("model=qwen2_vl_7b", "selector=random").selector.name == "random"


def test_the_six_models_of_the_paper_are_there() -> None:
    hub_ids = {OmegaConf.load(path).get("name_or_path") for path in (config_dir() / "model").glob("*.yaml")}
    assert hub_ids >= {
        "llava-hf/llava-1.5-7b-hf",
        "llava-hf/llava-1.5-13b-hf",
        "llava-hf/llava-v1.6-vicuna-7b-hf",
        "llava-hf/llava-v1.6-vicuna-13b-hf",
        "Qwen/Qwen2.5-VL-7B-Instruct",
        "OpenGVLab/InternVL3-8B-hf",
    }


@pytest.mark.parametrize(
    ("override", "plain"),
    [
        ("budget=0.3", [0.3]),
        ("budget=1", [1.0]),
        ("budget=[0.5,0.15]", [0.5, 0.15]),
        ("budget={kv_ratio: 0.3}", [{"kv_ratio": 0.3}]),
        ("budget={flops_ratio: 0.3}", [0.3]),
        ("budget=[0.3,{kv_bytes: 1e6}]", [0.3, {"kv_bytes": 1e6}]),
        ("budget={latency_ratio: 0.3}", [{"latency_ratio": 0.3}]),
        ("budget=[{latency_ms: 20},{latency_ratio: 0.5}]", [{"latency_ms": 20.0}, {"latency_ratio": 0.5}]),
    ],
)
@pytest.mark.parametrize("experiment", [[], ["experiment=smoke"]], ids=["plain", "over an experiment"])
@pytest.mark.fast_cases(4)
def test_a_budget_is_a_number_a_mapping_or_a_list(override: str, plain: list[object], experiment: list[str]) -> None:
    assert [budget.plain for budget in composed(*experiment, override).budget] == plain


@pytest.mark.parametrize("option", sorted(path.stem for path in (config_dir() / "search").glob("*.yaml")))
@pytest.mark.fast_cases(1)
def test_the_quick_experiment_takes_every_solver(option: str) -> None:
    given = [f"search={option}", *NEEDED.get(f"search={option}", ())]
    assert composed("experiment=smoke", *given).search == composed(*given).search


def test_a_storage_is_a_file_or_a_url_without_a_password() -> None:
    url = "postgresql+psycopg://user@host/db"
    assert composed(f"storage={url}").storage == url
    message = error_of("search=exact_optuna", "storage=postgresql+psycopg://user:secret@host/db")
    assert "storage: a password" in message
    assert "PGPASSWORD" in message
    assert "secret" not in message


def test_the_budgets_of_a_configuration_are_those_of_the_library() -> None:
    assert composed("budget={kv_ratio: 0.25}").budget == (Budget(kv_ratio=0.25),)


def test_the_solver_key_chooses_the_section() -> None:
    config = composed("search=exact_optuna", "search.sampler=gp", "seed=7")
    assert isinstance(config.search, ExactOptunaConfig)
    assert (config.search.sampler, config.search.seed) == ("gp", 7)


def test_all_errors_come_at_once_with_their_paths() -> None:
    message = error_of("budget=30", "data.num_samples=0", "data.answers=techer", "model.dtype=fp32", "+modle.x=1")
    assert message.startswith("the configuration has 5 errors:")
    assert "budget: `0 < flops_ratio <= 1` must hold, but got (flops_ratio=30); for 30 % write 0.3" in message
    assert "data.num_samples: input should be greater than 0, but got 0" in message
    assert "data.answers: must be one of teacher, ground_truth, but got 'techer'; did you mean 'teacher'?" in message
    assert "model.dtype: must be one of auto, float32, bfloat16, float16, but got 'fp32'" in message
    assert "modle: unknown key; did you mean 'model'?" in message


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["+search.num_finalist=3"], "search.num_finalist: unknown key; did you mean 'num_finalists'"),
        (["+space.zzz=3"], "space.zzz: unknown key; the keys are name, shares,"),
        (["search.solver=additive_exat"], "search.solver: must be one of additive_exact, rerank, additive_optuna"),
        (["+search.num_trials=5"], "search.num_trials: unknown key"),  # of another solver
        (["budget=[0.5,-1]"], "budget[1]: `0 < flops_ratio <= 1` must hold, but got (flops_ratio=-1)"),
        (["budget=0"], "budget: `0 < flops_ratio <= 1` must hold, but got (flops_ratio=0)"),
        (["budget=[0.3,0.3]"], "the budgets must differ, but got [0.3, 0.3]"),
        (["budget=[]"], "at least one budget is needed, e.g. budget=0.3"),
        (["budget=all"], "budget: `flops_ratio` must be a number, but got (flops_ratio='all')"),
        (["budget={kv_ratio: 0.2, flops: 3}"], "budget: exactly one of `flops_ratio`, `kv_ratio`, `flops`, `kv_bytes`"),
        (["budget={kv_ratoi: 0.2}"], "budget: a budget is one of flops_ratio, kv_ratio, flops,"),
        (["budget=true"], "budget: `flops_ratio` must be a number, but got (flops_ratio=True)"),
        (["+eval.limt=3"], "eval.limt: unknown key; did you mean 'limit'?"),
        (["eval=pocket13", "eval.limit=0"], "eval: suite 'pocket13': `limit >= 1` must hold, but got (limit=0)"),
        (["eval=pocket13", "eval.judge=yes_please"], "eval: suite 'pocket13': `judge` must be true or false"),
        (["eval=pocket13", "eval.benchmarks=[gqu]"], "eval: unknown benchmark 'gqu'; did you mean 'gqa'?"),
        (["eval=pocket13", "eval.benchmarks=gqa"], "eval: `benchmarks` must be a list, but got 'gqa'"),
        (["eval.name=poket13"], "eval: unknown suite 'poket13'"),
        (["data=jsonl"], "data: `name=jsonl` needs a file; set data.path=FILE.jsonl"),
        (["data.seed=true"], "data.seed: input should be a valid integer, but got True"),
        (["space=dop_groups", "space.shares=[0.5,0.6]"], "`shares` must be positive and sum to 1, but got [0.5, 0.6]"),
        (["space=dop_groups", "space.shares=[1.0]"], "needs 2 or more `shares`"),
        (["space=dop", "space.shares=[0.5,0.5]"], "has one group of tokens"),
        (["model.device=cpu", "model.device_map=auto"], "exclude each other"),
        (["batch_size=???"], "the configuration cannot be resolved: Missing mandatory value: batch_size"),
    ],
)
def test_a_mistake_is_named(overrides: list[str], expected: str) -> None:
    assert expected in error_of(*overrides)


def test_an_unresolvable_interpolation_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="cannot be resolved"):
        parse_config(OmegaConf.create({"seed": "${nowhere}"}))


def test_the_config_is_frozen() -> None:
    with pytest.raises(ValueError, match="frozen"):
        composed().seed = 3


def test_importing_the_config_imports_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, dop_search.app.config; sys.exit(any(m in sys.modules for m in ('torch', 'mlflow', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_missing_config_folder_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("dop_search.utils.conf._PACKAGE", tmp_path / "dop_search")
    with pytest.raises(ConfigError, match="reinstall dop-search"):
        config_dir()
    packaged = tmp_path / "dop_search" / "conf"
    packaged.mkdir(parents=True)
    (packaged / "config.yaml").touch()
    assert config_dir() == packaged


# -- any configuration ----------------------------------------------------------------------------

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, 10**12)
    | st.floats()
    | st.sampled_from(["", "0.5", "auto", "pocket", "none", "${x}", "???", "foo", 10**400]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["a", "name"]), inner, max_size=2),
    max_leaves=5,
)


def places(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, item in value.items() if isinstance(value, dict) else ():
        yield (*path, key)
        yield from places(item, (*path, key))


DEFAULTS = SearchConfig().model_dump(mode="json") | {"study": {"name": "compare"}, "storage": "a.journal"}


@pytest.mark.slow
@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(place=st.sampled_from(sorted(places(DEFAULTS))), value=VALUES)
def test_any_configuration_is_taken_as_it_stands_or_refused_in_words(place: tuple[str, ...], value: Any) -> None:
    tree = copy.deepcopy(DEFAULTS)
    target: Any = tree
    for key in place[:-1]:
        target = target[key]
    target[place[-1]] = value
    try:
        config = parse_config(OmegaConf.create(tree))
    except ConfigError as error:
        message = str(error)
    else:
        kept: Any = config.model_dump(mode="json")
        for key in place:
            kept = kept[key]
        if place[0] == "budget":
            kept = [item["flops_ratio"] for item in kept]
            value = value if isinstance(value, list) else [value]
        if isinstance(value, dict):
            kept = {name: kept[name] for name in value}
        assert kept == value or ([kept] == [[value]]), "an import may stand without a list"
        return
    assert place[0] in message or "cannot be resolved" in message


@pytest.mark.parametrize("argument", ["model=null", "data=1", "model=1.5", "data=[]", "space=true", "eval={}"])
def test_a_group_takes_the_name_of_an_option_and_nothing_else(argument: str) -> None:
    with pytest.raises(
        ConfigError, match=rf"{re.escape(repr(argument))} must choose one of .*{argument.split('=')[0]}.KEY="
    ):
        check_choices([argument], config_dir())
    check_choices(
        ["model=pocket", "space=dop,uniform", "budget={kv_ratio: 0.3}", "budget=null", "data=[", "--help"], config_dir()
    )
