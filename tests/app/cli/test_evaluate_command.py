"""``dop-eval``: help, configuration, what it prints; the pipeline is a stand-in."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from support.command_line import exit_status
from support.score_records import example_evaluation

from dop_search.app.cli.evaluate import main
from dop_search.app.config import EvalRunConfig
from dop_search.app.evaluate import read_strategies
from dop_search.app.record import SCORES_FILE, EvalRecord
from dop_search.strategy import Strategy
from dop_search.utils.conf import config_dir
from dop_search.utils.errors import CacheError, ConfigError
from dop_search.utils.progress import Progress


class Pipeline(ModuleType):
    """Remembers what it was asked to run."""

    def __init__(self) -> None:
        super().__init__("dop_search.app.evaluate")
        self.calls: list[EvalRunConfig] = []

    def evaluate(self, config: EvalRunConfig, run_dir: Path, progress: Progress) -> EvalRecord:
        assert isinstance(progress, Progress)
        self.calls.append(config)
        strategies = {Path(file).stem: (Strategy.full(12), 0.3, 0.98) for file in config.strategy}
        record = example_evaluation(strategies)
        record.save(run_dir / SCORES_FILE)
        return record


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Pipeline:
    stand_in = Pipeline()
    monkeypatch.setitem(sys.modules, "dop_search.app.evaluate", stand_in)
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    monkeypatch.chdir(tmp_path)
    return stand_in


def run(*arguments: str) -> int:
    """The exit status of ``dop-eval ARGUMENTS``."""
    return exit_status(main, "dop-eval", *arguments)


def test_scores_are_printed_and_saved(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("strategy=[a.json,b.json]", "eval.limit=20", "tracking=none", "hydra.run.dir=here") == 0
    (config,) = pipeline.calls
    assert config.strategy == ("a.json", "b.json")
    assert (config.eval.name, config.eval.limit, config.eval.batch_size) == ("pocket13", 20, 16)
    output = capsys.readouterr().out
    for text in ("a: q≤12", "30.0 % of the FLOPs", "mme (points)", "1764.0", "98.0", "here/scores.json"):
        assert text in output
    assert max(map(len, output.splitlines())) <= 80
    assert json.loads((tmp_path / "here" / "scores.json").read_text())["suite"]["suite"] == "pocket13"


def test_one_file_a_list_or_none(pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    for argument, expected in (
        ("strategy=a.json", ("a.json",)),
        ("strategy=[a.json]", ("a.json",)),
        ("strategy=null", ()),
    ):
        assert run(argument, "tracking=none", "eval=dop13_static", "eval.benchmarks=[gqa,pope]") == 0
        assert pipeline.calls[-1].strategy == expected
        assert [item.name for item in pipeline.calls[-1].eval.benchmarks] == ["gqa", "pope"]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval=accuracy"], "eval: dop-eval runs a suite of benchmarks, e.g. eval=pocket13"),
        (["strategy=[a.json,a.json]"], "each strategy is given once"),
        (["+strategi=a.json"], "strategi: unknown key; did you mean 'strategy'"),
        (["method=fastv"], "methods are fitted to shares of the full model's FLOPs, but got (method=['fastv'], "),
        (["method=fastv", "flops_ratio=[0.3,0.3]"], "each flops_ratio is given once, but got [0.3, 0.3]"),
        (["eval.limit=0"], "limit"),
        (["eval=poket13"], "Could not find 'eval/poket13'"),
    ],
)
def test_an_error_is_a_message_and_a_status(
    arguments: list[str],
    expected: str,
    pipeline: Pipeline,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(*arguments, "tracking=none") == 1
    captured = capsys.readouterr()
    assert expected in captured.err
    assert "Traceback" not in captured.err + captured.out
    assert pipeline.calls == []


def test_help_shows_examples_and_suites_and_runs_nothing(
    pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run("--help") == 0
    output = capsys.readouterr().out
    for text in ("dop-eval strategy=outputs", "dop13_static", "pocket13", "limit: null", "llava_next_7b"):
        assert text in output
    assert pipeline.calls == []
    assert list(tmp_path.iterdir()) == []


def test_help_lists_its_own_groups_with_every_option(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--help") == 0
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


def test_strategies_of_the_same_name_are_called_by_their_folders(tmp_path: Path) -> None:
    files = []
    for folder in ("one", "two"):
        files.append(str(tmp_path / folder / "strategy-0.3.json"))
        Path(files[-1]).parent.mkdir()
        Strategy.full(12).save(files[-1])
    assert list(read_strategies(tuple(files))) == ["one-strategy-0.3", "two-strategy-0.3"]
    assert list(read_strategies((files[0],))) == ["strategy-0.3"]
    (tmp_path / "x" / "one").mkdir(parents=True)
    Strategy.full(12).save(tmp_path / "x" / "one" / "strategy-0.3.json")
    with pytest.raises(ConfigError, match="different names"):
        read_strategies((files[0], str(tmp_path / "x" / "one" / "strategy-0.3.json")))


def test_the_record_round_trips_and_names_what_is_wrong(tmp_path: Path) -> None:
    record = example_evaluation({"a": (Strategy.depthwise(12, 3, 8, 2, 72), 0.15, 0.9)})
    record.save(tmp_path / SCORES_FILE)
    assert EvalRecord.load(tmp_path) == record
    with pytest.raises(CacheError, match="there is no record of dop-eval at"):
        EvalRecord.load(tmp_path / "nothing")
    data = json.loads((tmp_path / SCORES_FILE).read_text())
    (tmp_path / SCORES_FILE).write_text(json.dumps({**data, "version": 2}))
    with pytest.raises(CacheError, match="version"):
        EvalRecord.load(tmp_path)


def test_the_command_is_there_and_its_help_needs_neither_torch_nor_mlflow() -> None:
    code = (
        "import sys, dop_search.app.cli.evaluate; "
        "sys.exit(str([m for m in ('torch', 'mlflow', 'lmms_eval') if m in sys.modules] or ''))"
    )
    result = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert result.stderr.strip() == ""
