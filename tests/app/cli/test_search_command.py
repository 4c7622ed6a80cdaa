"""The command: help, what it hands to the pipeline, errors without a traceback. The pipeline is a stand-in."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.command_line import exit_status
from support.records import example_record

from dop_search.app.cli.search import main
from dop_search.app.config import SearchConfig
from dop_search.app.record import RECORD_FILE, Record
from dop_search.utils.errors import BudgetError
from dop_search.utils.progress import Progress


class Pipeline(ModuleType):
    """Remembers what it was asked to run; refuses budgets below 0.1."""

    def __init__(self) -> None:
        super().__init__("dop_search.app.search")
        self.calls: list[tuple[SearchConfig, Path]] = []

    def run(self, config: SearchConfig, run_dir: Path, progress: Progress) -> Record:
        assert isinstance(progress, Progress)
        self.calls.append((config, run_dir))
        if config.budget[0].value < 0.1:
            raise BudgetError("`flops_ratio` 0.05 is infeasible; the smallest feasible is 0.09", 0.09)
        record = example_record()
        record.save(run_dir / RECORD_FILE)
        return record


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pipeline:
    stand_in = Pipeline()
    monkeypatch.setitem(sys.modules, "dop_search.app.search", stand_in)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.chdir(tmp_path)
    return stand_in


def run(*arguments: str) -> int:
    """The exit status of ``dop-search ARGUMENTS``."""
    return exit_status(main, "dop-search", *arguments)


def test_a_run_prints_the_table_and_where_everything_is(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("budget=0.3", "space=dop", "hydra.run.dir=here") == 0
    config, run_dir = pipeline.calls[0]
    assert ([budget.plain for budget in config.budget], config.space.name) == ([0.3], "dop")
    assert run_dir == tmp_path / "here"
    assert (run_dir / RECORD_FILE).exists()
    output = capsys.readouterr().out
    assert "held-out" in output
    assert "0.0317" in output
    assert f"mlflow ui --backend-store-uri sqlite:///{tmp_path / 'mlflow.db'}" in output
    assert "here/report.html" in output


@pytest.mark.slow
def test_a_sweep_runs_every_combination(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("-m", "budget=0.15,0.3,{kv_ratio: 0.5}", "space=dop,uniform", "tracking=none") == 0
    combinations = [(config.budget[0].plain, config.space.name) for config, _ in pipeline.calls]
    assert combinations == [
        (budget, space) for budget in (0.15, 0.3, {"kv_ratio": 0.5}) for space in ("dop", "uniform")
    ]
    assert len({run_dir for _, run_dir in pipeline.calls}) == 6


@pytest.mark.slow
def test_a_sweep_over_model_data_space_budget_and_seed(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = ("model=pocket,llava_1_5_7b", "data=pocket,gqa", "space=dop,uniform", "budget=0.3", "seed=0,1")
    assert run("-m", *groups, "tracking=none") == 0
    seen = {(c.model.name_or_path, c.data.name, c.space.name, c.seed) for c, _ in pipeline.calls}
    assert len(seen) == len(pipeline.calls) == 16


def test_the_sweep_experiment_is_a_sweep(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("experiment=sweep_spaces", "tracking=none") == 0
    assert [config.space.name for config, _ in pipeline.calls] == ["uniform", "dop", "dop_split", "dop_groups"]


def test_groups_of_ones_own(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "local.yaml").write_text("name_or_path: /models/local\n")
    assert run("--config-dir", str(tmp_path / "mine"), "model=local", "tracking=none") == 0
    assert pipeline.calls[0][0].model.name_or_path == "/models/local"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["budget=3", "+modle=1"], "did you mean 'model'?"),
        (["budget=0.05", "tracking=none"], "the smallest feasible is 0.09"),
        (["model=poket"], "Could not find 'model/poket'"),
        (["budgett=0.3"], "Could not override 'budgett'"),
        (["tracking.uri=nowhere"], "tracking.uri='nowhere'"),
    ],
)
def test_an_error_is_a_message_and_a_status(
    arguments: list[str],
    expected: str,
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    assert run(*arguments) == 1
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert not list(tmp_path.rglob(RECORD_FILE))


def test_one_infeasible_job_does_not_stop_a_sweep_but_fails_it(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("-m", "budget=0.05,0.3", "tracking=none") == 1
    assert [config.budget[0].plain for config, _ in pipeline.calls] == [0.05, 0.3]
    assert len(list(tmp_path.rglob(RECORD_FILE))) == 1
    assert "the smallest feasible is 0.09" in capsys.readouterr().err


def test_help_lists_groups_and_examples_and_runs_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("--help") == 0
    output = capsys.readouterr().out
    groups = ("space: dop, dop_groups, dop_split, uniform", "hydra/launcher: basic, joblib, ray_gpu, slurm")
    for text in (*groups, "budget=0.3", "llava_next_7b", "experiment=smoke"):
        assert text in output
    assert pipeline.calls == []
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_says_how_to_continue(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: SearchConfig, run_dir: Path, progress: Progress) -> Record:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    assert run("tracking=none") == 130
    assert "continues where it stopped" in capsys.readouterr().err


def test_a_sweep_shows_no_configuration(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in (("-m", "--cfg", "hydra"), ("--multirun", "--info", "all")):
        monkeypatch.setattr(sys, "argv", ["dop-search", *flags])
        with pytest.raises(SystemExit, match=r"dop-search: --(cfg|info) goes with one configuration, -m with many"):
            main()
    assert pipeline.calls == []
