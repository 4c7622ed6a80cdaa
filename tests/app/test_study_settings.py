"""What a study has no use for is refused before a model is loaded; committed results are those of their files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from PIL import Image
from support.small_studies import PUBLISHED, STUDY_EXPERIMENTS, StudyRunner, study_config

from dop_search.app import begin
from dop_search.app.config import SearchConfig, parse_config
from dop_search.app.results import ResultFile, plain, read_result
from dop_search.app.study import check_study, find_study, open_study, study_names
from dop_search.app.workbench import Workbench
from dop_search.utils.conf import CONFIG_NAME, config_dir
from dop_search.utils.errors import ConfigError, DataError, DopError
from dop_search.utils.progress import Progress


def published(experiment: str) -> SearchConfig:
    """``dop-search experiment=NAME`` as it stands."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return parse_config(compose(CONFIG_NAME, [f"experiment={experiment}"]))


@pytest.fixture(autouse=True)
def _no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(begin, "load", forbidden)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("budget=[{kv_ratio: 0.3}]", r"FLOPs, but got the budget {'kv_ratio': 0\.3}; give ratios, as in budget="),
        ("budget=[0.3,{latency_ms: 20}]", r"got the budget {'latency_ms': 20\.0}"),
        ("search=exact_optuna", r"no use for `search`, but got search\.solver=exact_optuna.*study\.options"),
        ("search.num_proposals=3", r"got search\.num_proposals=3; leave it out"),
        ("eval=pocket13", r"no use for `eval`, but got eval\.name=pocket13"),
        ("data.num_heldout=1", r"intervals over samples, but got data\.num_samples=2 and data\.num_heldout=1"),
        ("storage=shared.journal", r"no use for `storage`, but got storage=shared\.journal.*study\.workers"),
    ],
)
def test_a_setting_that_a_study_does_not_read_is_refused(
    run_small_study: StudyRunner, override: str, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_small_study("split_attention", override)


def unanswered(folder: Path) -> tuple[str, ...]:
    """Overrides for a file of 12 lines, an image each, without answers."""
    lines = []
    for index in range(12):
        Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / f"{index}.png")
        lines.append(json.dumps({"image": f"{index}.png", "question": "?"}))
    (folder / "mine.jsonl").write_text("\n".join(lines))
    return "data=jsonl", f"data.path={folder / 'mine.jsonl'}", "data.num_test=4"


@pytest.mark.parametrize(
    "name", ["compare", "failures", "objective", "text_operations", "additive_vs_exact", "long_answers"]
)
def test_a_study_that_judges_answers_needs_them(run_small_study: StudyRunner, tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"mine\.jsonl' line \d+ has no answer"):
        run_small_study(name, *unanswered(tmp_path))


def test_samples_and_selector_are_checked_before_loading(run_small_study: StudyRunner, tmp_path: Path) -> None:
    given = unanswered(tmp_path)
    with pytest.raises(DataError, match=r"heldout 4 of 5 .*takes 14 lines"):
        run_small_study("split_attention", *given, "data.num_heldout=5")
    with pytest.raises(DopError, match="unknown selector 'cls_atention'"):
        run_small_study("split_attention", *given, "selector.name=cls_atention")
    with pytest.raises(AssertionError, match="a model was loaded"):
        run_small_study("split_attention", *given)
    with pytest.raises(AssertionError, match="a model was loaded"):  # reads no held-out samples
        run_small_study("claims", *given, "data.num_heldout=99")


@pytest.mark.parametrize("name", STUDY_EXPERIMENTS)
@pytest.mark.fast_cases(3)
def test_an_experiment_sets_every_option_and_nothing_that_its_study_does_not_read(name: str, tmp_path: Path) -> None:
    """What is in the file can be set on the command line without a `+`."""
    config = study_config(name, tmp_path, "data.num_samples=256")
    study = open_study(config)
    check_study(study, config)
    assert config.study is not None
    assert set(config.study.options) == set(type(study).model_fields)


@pytest.mark.slow
def test_every_study_has_an_experiment_that_writes_to_outputs() -> None:
    chosen = [published(name).study for name in STUDY_EXPERIMENTS]
    assert {study.name for study in chosen if study is not None} == set(study_names())
    folders = [study.path for study in chosen if study is not None]
    assert folders == [f"outputs/{name}" for name in STUDY_EXPERIMENTS]


def test_a_workbench_takes_flops_ratios_only(tmp_path: Path, pocket) -> None:  # type: ignore[no-untyped-def]
    config = study_config("split_attention", tmp_path, "budget=[{kv_ratio: 0.3}]")
    bench = Workbench(config, pocket, Progress())
    with pytest.raises(ConfigError, match="kv_ratio"):
        bench.budgets  # noqa: B018


@pytest.mark.parametrize("experiment", [name for name in PUBLISHED if name != "claims"])
@pytest.mark.fast_cases(3)
def test_committed_results_were_measured_as_their_files_say(experiment: str) -> None:
    config = published(experiment)
    assert config.study is not None
    assert config.study.published is not None
    result = read_result(config_dir().parent / config.study.published / "result.json")
    assert result["study"] == config.study.name
    setup, settings = result["setup"], plain(open_study(config).settings(config))
    assert {name: setup[name] for name in settings} == settings
    assert setup["data"] == config.data.model_dump(mode="json", exclude_defaults=True)
    assert setup["model"] == config.model.name_or_path


@pytest.mark.slow
def test_rows_are_of_one_selector_space_and_set_of_options(tmp_path: Path) -> None:
    def opened(*overrides: str) -> None:
        config = study_config("solver", tmp_path, *overrides)
        ResultFile(tmp_path / "out", "solver", open_study(config).settings(config)).summarize({"all": 1})

    opened()
    opened("study.options.seeds=[0,1]")  # more rows of the same kind
    with pytest.raises(ConfigError, match=r"options\.num_trials: file 60, now 9.*study\.folder"):
        opened("study.options.num_trials=9")
    with pytest.raises(ConfigError, match=r"\(selector\.name: file 'cls_attention', now 'divprune'\)"):
        opened("selector=divprune")
    with pytest.raises(ConfigError, match=r"space\.num_token_levels"):
        opened("space.num_token_levels=5")


@pytest.mark.parametrize("name", study_names())
def test_a_study_asks_a_question_and_explains_its_options(name: str) -> None:
    study = find_study(name)
    assert study.question.endswith("?")
    assert study.adds_rows <= set(study.model_fields), "options that only add rows are options"
    assert all(field.description for field in study.model_fields.values())


def test_answers_are_compared_with_the_full_models(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match=r"data\.answers=ground_truth; leave it at teacher"):
        run_small_study("compare", "data.answers=ground_truth")


def test_another_budget_of_solvers_or_another_file_is_another_result(tmp_path: Path) -> None:
    def settings(*overrides: str) -> dict[str, object]:
        config = study_config("solver", tmp_path, *overrides)
        return open_study(config).settings(config)

    assert settings("budget=0.2") != settings("budget=0.1")
    data = unanswered(tmp_path)
    before = settings(*data)
    assert settings(*data) == before
    (tmp_path / "mine.jsonl").write_text((tmp_path / "mine.jsonl").read_text() + "\n")
    assert settings(*data) != before
