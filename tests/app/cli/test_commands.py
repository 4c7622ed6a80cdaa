"""``dop-search`` and ``dop-eval``: help, what they hand to the pipeline, errors without a traceback.

The pipelines are stand-ins.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from support.command_line import exit_status
from support.records import example_record
from support.score_records import example_evaluation

from dop_search.app.cli import evaluate as evaluate_command
from dop_search.app.cli import search as search_command
from dop_search.app.config import EvalRunConfig, SearchConfig
from dop_search.app.record import RECORD_FILE, SCORES_FILE, EvalRecord, Record
from dop_search.strategy import Strategy
from dop_search.utils.conf import config_dir
from dop_search.utils.errors import BudgetError
from dop_search.utils.progress import Progress

COMMANDS = {"dop-search": search_command.main, "dop-eval": evaluate_command.main}


class Pipeline(ModuleType):
    """Remembers what it was asked to run and where; refuses budgets below 0.1."""

    def __init__(self) -> None:
        super().__init__("pipeline")
        self.calls: list[tuple[Any, Path]] = []

    def run(self, config: SearchConfig, run_dir: Path, progress: Progress) -> Record:
        assert isinstance(progress, Progress)
        self.calls.append((config, run_dir))
        if config.budget[0].value < 0.1:
            raise BudgetError("`flops_ratio` 0.05 is infeasible; the smallest feasible is 0.09", 0.09)
        record = example_record()
        record.save(run_dir / RECORD_FILE)
        return record

    def evaluate(self, config: EvalRunConfig, run_dir: Path, progress: Progress) -> EvalRecord:
        assert isinstance(progress, Progress)
        self.calls.append((config, run_dir))
        strategies = {Path(file).stem: (Strategy.full(12), 0.3, 0.98) for file in config.strategy}
        record = example_evaluation(strategies)
        record.save(run_dir / SCORES_FILE)
        return record


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pipeline:
    stand_in = Pipeline()
    for module in ("search", "evaluate"):
        monkeypatch.setitem(sys.modules, f"dop_search.app.{module}", stand_in)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.chdir(tmp_path)
    return stand_in


def run(command: str, *arguments: str) -> int:
    """The exit status of ``COMMAND ARGUMENTS``."""
    return exit_status(COMMANDS[command], command, *arguments)


def search(*arguments: str) -> int:
    """The exit status of ``dop-search ARGUMENTS``."""
    return run("dop-search", *arguments)


def test_a_run_prints_the_table_and_where_everything_is(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert search("budget=0.3", "space=dop", "hydra.run.dir=here") == 0
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
def test_a_sweep_runs_every_combination(pipeline: Pipeline) -> None:
    assert search("-m", "budget=0.15,0.3,{kv_ratio: 0.5}", "space=dop,uniform", "tracking=none") == 0
    combinations = [(config.budget[0].plain, config.space.name) for config, _ in pipeline.calls]
    assert combinations == [
        (budget, space) for budget in (0.15, 0.3, {"kv_ratio": 0.5}) for space in ("dop", "uniform")
    ]
    assert len({run_dir for _, run_dir in pipeline.calls}) == 6


@pytest.mark.slow
def test_a_sweep_over_model_data_space_budget_and_seed(pipeline: Pipeline) -> None:
    groups = ("model=pocket,llava_1_5_7b", "data=pocket,gqa", "space=dop,uniform", "budget=0.3", "seed=0,1")
    assert search("-m", *groups, "tracking=none") == 0
    seen = {(c.model.name_or_path, c.data.name, c.space.name, c.seed) for c, _ in pipeline.calls}
    assert len(seen) == len(pipeline.calls) == 16


@pytest.mark.slow
def test_the_sweep_experiment_is_a_sweep(pipeline: Pipeline) -> None:
    assert search("experiment=sweep_spaces", "tracking=none") == 0
    assert [config.space.name for config, _ in pipeline.calls] == ["uniform", "dop", "dop_split", "dop_groups"]


def test_groups_of_ones_own(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "mine" / "model").mkdir(parents=True)
    (tmp_path / "mine" / "model" / "local.yaml").write_text("name_or_path: /models/local\n")
    assert search("--config-dir", str(tmp_path / "mine"), "model=local", "tracking=none") == 0
    assert pipeline.calls[0][0].model.name_or_path == "/models/local"


@pytest.mark.slow
def test_one_infeasible_job_does_not_stop_a_sweep_but_fails_it(
    pipeline: Pipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert search("-m", "budget=0.05,0.3", "tracking=none") == 1
    assert [config.budget[0].plain for config, _ in pipeline.calls] == [0.05, 0.3]
    assert len(list(tmp_path.rglob(RECORD_FILE))) == 1
    assert "the smallest feasible is 0.09" in capsys.readouterr().err


def test_ctrl_c_says_how_to_continue(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(config: SearchConfig, run_dir: Path, progress: Progress) -> Record:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    assert search("tracking=none") == 130
    assert "continues where it stopped" in capsys.readouterr().err


def test_a_sweep_shows_no_configuration(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for flags in (("-m", "--cfg", "hydra"), ("--multirun", "--info", "all")):
        monkeypatch.setattr(sys, "argv", ["dop-search", *flags])
        with pytest.raises(SystemExit, match=r"dop-search: --(cfg|info) goes with one configuration, -m with many"):
            search_command.main()
    assert pipeline.calls == []


def test_scores_are_printed_and_saved(pipeline: Pipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run("dop-eval", "strategy=[a.json,b.json]", "eval.limit=20", "tracking=none", "hydra.run.dir=here") == 0
    ((config, _),) = pipeline.calls
    assert config.strategy == ("a.json", "b.json")
    assert (config.eval.name, config.eval.limit, config.eval.batch_size) == ("pocket13", 20, 16)
    output = capsys.readouterr().out
    for text in ("a: q≤12", "30.0 % of the FLOPs", "mme (points)", "1764.0", "98.0", "here/scores.json"):
        assert text in output
    assert max(map(len, output.splitlines())) <= 80
    assert json.loads((tmp_path / "here" / "scores.json").read_text())["suite"]["suite"] == "pocket13"


def test_one_file_a_list_or_none(pipeline: Pipeline) -> None:
    for argument, expected in (
        ("strategy=a.json", ("a.json",)),
        ("strategy=[a.json]", ("a.json",)),
        ("strategy=null", ()),
    ):
        assert run("dop-eval", argument, "tracking=none", "eval=dop13_static", "eval.benchmarks=[gqa,pope]") == 0
        assert pipeline.calls[-1][0].strategy == expected
        assert [item.name for item in pipeline.calls[-1][0].eval.benchmarks] == ["gqa", "pope"]


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (["dop-search", "budget=3", "+modle=1"], "did you mean 'model'?"),
        (["dop-search", "budget=0.05", "tracking=none"], "the smallest feasible is 0.09"),
        (["dop-search", "model=poket"], "Could not find 'model/poket'"),
        (["dop-search", "budgett=0.3"], "Could not override 'budgett'"),
        (["dop-search", "tracking.uri=nowhere"], "tracking.uri='nowhere'"),
        (["dop-eval", "eval=accuracy"], "eval: dop-eval runs a suite of benchmarks, e.g. eval=pocket13"),
        (["dop-eval", "strategy=[a.json,a.json]"], "each strategy is given once"),
        (["dop-eval", "+strategi=a.json"], "strategi: unknown key; did you mean 'strategy'"),
        (
            ["dop-eval", "method=fastv"],
            "methods are fitted to shares of the full model's FLOPs, but got (method=['fast",
        ),
        (["dop-eval", "method=fastv", "flops_ratio=[0.3,0.3]"], "each flops_ratio is given once, but got [0.3, 0.3]"),
        (["dop-eval", "eval.limit=0"], "`limit >= 1` must hold, but got (limit=0)"),
        (["dop-eval", "eval=poket13"], "Could not find 'eval/poket13'"),
    ],
)
@pytest.mark.fast_cases(2)
def test_an_error_is_a_message_and_a_status(
    line: list[str], expected: str, pipeline: Pipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(*line) == 1
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert len(pipeline.calls) == ("budget=0.05" in line)
    assert not list(tmp_path.rglob("*.json"))


HELP = {
    "dop-search": (
        *(
            "space: any, dop, dop_full_kv, dop_groups, dop_split, uniform",
            "hydra/launcher: basic, joblib, ray_gpu, slurm",
        ),
        *("budget=0.3", "llava_next_7b", "experiment=smoke"),
    ),
    "dop-eval": ("dop-eval strategy=outputs", "dop13_static", "pocket13", "limit: null", "llava_next_7b"),
}


@pytest.mark.parametrize("command", HELP)
@pytest.mark.fast_cases(1)
def test_help_lists_groups_and_examples_and_runs_nothing(
    command: str, pipeline: Pipeline, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(command, "--help") == 0
    output = capsys.readouterr().out
    for text in HELP[command]:
        assert text in output
    assert pipeline.calls == []
    assert list(tmp_path.iterdir()) == []


def test_help_lists_its_own_groups_with_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("dop-eval", "--help") == 0
    block = capsys.readouterr().out.partition("== Groups")[2].partition("==\n")[2].partition("\n==")[0]
    listed = {
        line.split(":")[0]: set(line.split(":")[1].replace(",", "").split())
        for line in block.replace("\n  ", " ").splitlines()
        if ":" in line
    }
    groups = {"data", "eval", "model", "selector", "tracking"}
    assert set(listed) == {"hydra/launcher", *groups}
    for group in groups:
        options = {path.stem for path in (config_dir() / group).glob("*.yaml")}
        assert listed[group] == options - ({"accuracy", "none"} if group == "eval" else set())


def test_the_command_is_there_and_its_help_needs_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, dop_search.app.cli.evaluate; "
        "sys.exit(str([m for m in ('torch', 'mlflow', 'lmms_eval') if m in sys.modules] or ''))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.stderr.strip() == ""
