"""What MLflow holds after a search, and that a bad store is found before one."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support.forked import forked
from support.pictures import WITH_SUPPORT
from support.records import example_curves, example_record

from dop_search.app.config import TrackingConfig
from dop_search.app.record import CURVES_FILE, RECORD_FILE
from dop_search.app.tracking.connection import check_tracking, ui_command
from dop_search.app.tracking.store import log_benchmark, log_search, log_study
from dop_search.app.tracking.system import system_metrics
from dop_search.app.tracking.values import result_metrics, result_params, started_ms
from dop_search.strategy import Strategy
from dop_search.utils.errors import ConfigError

SEARCHES = """
import sys
from pathlib import Path
from dop_search.app.config import TrackingConfig
from dop_search.app.record import CURVES_FILE, RECORD_FILE, Named
from support.records import example_curves, example_record
from dop_search.app.tracking.store import log_search

run_dir, record = Path(sys.argv[2]), example_record()
record.save(run_dir / RECORD_FILE)
example_curves().save(run_dir / CURVES_FILE)
(run_dir / "plots").mkdir()
for name in ("report.html", *(f"plots/{number}.png" for number in range(8))):
    (run_dir / name).touch()
other = record.model_copy(update={"space": Named(name="uniform"), "solver": Named(name="exact_optuna")})
parents = [log_search(TrackingConfig(uri=sys.argv[1]), item, run_dir) for item in (record, other)]
(run_dir / "parents").write_text(" ".join(parents))
"""
"""Two searches of different spaces, in a process where nothing was imported before."""


@dataclass(frozen=True)
class Logged:
    """A store with two searches."""

    client: Any
    folder: Path
    parents: list[str]
    printed: str


@pytest.fixture(scope="module")
def logged(tmp_path_factory: pytest.TempPathFactory) -> Logged:
    folder = tmp_path_factory.mktemp("tracking")
    uri = f"sqlite:///{folder / 'sub' / 'mlflow.db'}"
    command = [sys.executable, "-c", SEARCHES, uri, str(folder / "run")]
    result = subprocess.run(command, check=True, capture_output=True, text=True, env=WITH_SUPPORT)
    from mlflow.tracking import MlflowClient

    parents = (folder / "run" / "parents").read_text().split()
    return Logged(MlflowClient(uri), folder, parents, result.stdout + result.stderr)


@pytest.fixture
def store(logged: Logged, tmp_path: Path) -> str:
    """A store of a test's own: a copy, as making one takes seconds."""
    shutil.copy(logged.folder / "sub" / "mlflow.db", tmp_path)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


def runs_of(client: Any, parent: str) -> list[Any]:
    experiment = client.get_experiment_by_name("dop-search")
    found = client.search_runs([experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    return sorted(found, key=lambda run: -run.data.metrics["flops_ratio"])


def test_one_parent_per_search_and_a_nested_run_per_budget(logged: Logged) -> None:
    client, parents = logged.client, logged.parents
    record = example_record()
    parent = client.get_run(parents[0])
    assert parent.info.status == "FINISHED"
    assert parent.data.tags["model_fingerprint"] == record.model.fingerprint
    assert parent.data.tags["data_fingerprint.heldout"] == "4e5f6a7b"
    assert parent.data.tags["version.torch"] == "2.15.0"
    assert parent.data.tags["mlflow.source.git.commit"].startswith("0123456789")
    assert parent.data.params["space"] == "dop_split"
    nested = runs_of(client, parents[0])
    assert [run.data.params["budget"] for run in nested] == ["0.5", "0.3", "0.15"]
    last, result = nested[-1], record.results[-1]
    assert last.data.metrics["kl_heldout"] == pytest.approx(result.kl_heldout)
    assert last.data.metrics["kl_heldout_difference_ci_high"] < 0
    expected = {"D_A": "3/8", "D_P": "2", "n_v": "72", "depth_kv": "8", "depth_ratio_mlp": "0.1667"}
    assert expected.items() <= last.data.params.items()


def test_curves_are_stepped_metrics_over_the_share_of_the_full_value(logged: Logged) -> None:
    client, parents, curves = logged.client, logged.parents, example_curves().curves
    stored = {name for name in client.get_run(parents[0]).data.metrics if name.startswith("curve/")}
    assert stored == {f"curve/{name}" for name in curves}
    for name, curve in curves.items():
        points = client.get_metric_history(parents[0], f"curve/{name}")
        shares = [point.step / 10_000 for point in points]
        assert shares == pytest.approx(list(curve.levels / curve.levels[-1]), abs=1e-4)
        assert len(set(shares)) == len(curve.levels)
        assert [point.value for point in points] == pytest.approx(list(curve.mean_nats))


def test_names_are_the_same_across_methods(logged: Logged) -> None:
    client, parents = logged.client, logged.parents
    names = [
        [(set(run.data.metrics), {key for key in run.data.params if "." not in key}) for run in runs_of(client, parent)]
        for parent in parents
    ]
    assert names[0] == names[1]


def test_artifacts_lie_beside_the_database(logged: Logged) -> None:
    client, folder, parents = logged.client, logged.folder, logged.parents
    names = {item.path for item in client.list_artifacts(parents[0])}
    assert names == {RECORD_FILE, CURVES_FILE, "report.html", "plots"}
    assert len(client.list_artifacts(parents[0], "plots")) == 8
    uri = runs_of(client, parents[0])[-1].info.artifact_uri
    path = Path(uri.removeprefix("file://")) / "strategy.json"
    assert path.is_relative_to(folder / "sub" / "mlartifacts")
    assert Strategy.from_json(json.loads(path.read_text())) == example_record().results[-1].strategy


def test_metrics_hold_only_what_was_measured() -> None:
    result = example_record().results[0]
    bare = result.model_copy(update={"accuracy_full": None, "kl_additive": None, "uniform": None})
    missing = set(result_metrics(result)) - set(result_metrics(bare))
    assert {"accuracy_full", "kl_additive", "uniform_kl_heldout", "uniform_kl_heldout_ci_low"} <= missing
    assert all(isinstance(value, float) for value in result_metrics(result).values())


def test_params_of_groups() -> None:
    strategy = Strategy.depthwise(12, q=[8, 2], kv=[9, 4], mlp=[4, 1], shares=[0.25, 0.75])
    params = result_params(example_record({0.3: strategy}).results[0])
    assert (params["D_A"], params["D_P"], params["n_v"], params["depth_q"]) == ("9,2/4", "4,1", "all", "8,2")


def test_the_line_that_opens_the_runs_works_from_anywhere(logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(logged.folder / "sub")
    number = logged.client.get_experiment_by_name("dop-search").experiment_id
    start = f"mlflow ui --backend-store-uri sqlite:///{logged.folder / 'sub' / 'mlflow.db'}  # then open "
    page = (
        f"http://127.0.0.1:5000/#/experiments/{number}/runs?workflowType=machine_learning&viewStateShareKey=strategies"
    )
    assert ui_command(TrackingConfig()) == start + page
    assert ui_command(TrackingConfig(backend="none")) is None
    assert ui_command(TrackingConfig(uri="http://127.0.0.1:9")) == "http://127.0.0.1:9", "a store that is away"


def test_a_runs_row_says_what_it_is_made_of(logged: Logged) -> None:
    record = example_record()
    for identifier in (logged.parents[0], runs_of(logged.client, logged.parents[0])[-1].info.run_id):
        run = logged.client.get_run(identifier)
        assert run.data.tags["mlflow.source.name"] == "dop-search"
        assert run.data.tags["mlflow.user"]
        sets = {item.dataset.name: item.dataset.digest for item in run.inputs.dataset_inputs}
        assert sets == {f"pocket {split}": digest for split, digest in record.data.fingerprints.items()}
        assert run.info.run_name.startswith("pocket dop_split 0.")
    metrics = logged.client.get_run(logged.parents[0]).data.metrics
    for result in record.results:
        assert metrics[f"under {result.budget.text}/kl_heldout"] == pytest.approx(result.kl_heldout)
        assert metrics[f"under {result.budget.text}/flops_ratio"] == pytest.approx(result.flops_ratio)
        assert metrics[f"under {result.budget.text}/accuracy_pruned"] == pytest.approx(result.accuracy_pruned)


def test_the_view_of_the_printed_line_has_the_best_strategy_of_a_budget_first(logged: Logged) -> None:
    experiment = logged.client.get_experiment_by_name("dop-search")
    view = json.loads(experiment.tags["mlflow.sharedViewState.strategies"])
    order = f"{view['orderByKey']} {'ASC' if view['orderByAsc'] else 'DESC'}"
    found = logged.client.search_runs([experiment.experiment_id], view["searchFilter"], order_by=[order])
    assert [run.data.params["budget"] for run in found] == ["0.5", "0.5", "0.3", "0.3", "0.15", "0.15"]
    data = found[0].data
    names = [*(f"params.`{name}`" for name in data.params), *(f"metrics.`{name}`" for name in data.metrics)]
    assert set(view["selectedColumns"]) <= set(names)


def test_strategies_are_loaded_from_runs_and_from_the_registry(logged: Logged, monkeypatch: pytest.MonkeyPatch) -> None:
    import dop_search as dop

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{logged.folder / 'sub' / 'mlflow.db'}")
    expected, run = example_record().results[-1].strategy, runs_of(logged.client, logged.parents[0])[-1].info.run_id
    name = "pocket-flops_ratio-0.15"
    logged.client.set_registered_model_alias(name, "best", "1")
    for address in (f"runs:/{run}/strategy.json", f"models:/{name}/1", f"models:/{name}/2", f"models:/{name}@best"):
        assert dop.Strategy.load(address) == expected
    for address in ("runs:/nothing/strategy.json", f"models:/{name}/9", "models:/nothing/1"):
        with pytest.raises(ConfigError, match=r"cannot be opened in 'sqlite.*set MLFLOW_TRACKING_URI"):
            dop.Strategy.load(address)
    assert dop.Strategy.load(Path(logged.client.get_run(run).info.artifact_uri[7:]) / "strategy.json") == expected


def test_system_metrics_are_logged_when_asked_for(store: str, tmp_path: Path) -> None:
    from mlflow.tracking import MlflowClient

    record = example_record()
    for wanted in (False, True):
        config = TrackingConfig(uri=store, system_metrics=wanted)
        with system_metrics(config, tmp_path, interval_s=0.05):
            time.sleep(0.5)
            identifier = log_search(config, record, tmp_path)
        client = MlflowClient(config.uri)
        assert identifier is not None
        load = client.get_metric_history(identifier, "system/system_memory_usage_percentage")
        assert all(0 < point.value <= 100 for point in load)
        assert len(load) >= 2 if wanted else not load


def test_a_bad_store_is_found_at_once_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "foreign.db").write_text("this is no database, and it is longer than a header would be" * 20)
    (tmp_path / "folder").mkdir()
    start = time.monotonic()
    for uri in (
        f"sqlite:///{tmp_path / 'foreign.db'}",
        f"sqlite:///{tmp_path / 'folder'}",
        f"sqlite:///{tmp_path / 'foreign.db' / 'below.db'}",
        "mlruns",
        "http://127.0.0.1:9",
    ):
        with pytest.raises(ConfigError) as caught:
            check_tracking(TrackingConfig(uri=uri))
        assert uri in str(caught.value)
        assert "tracking=none" in str(caught.value)
    assert time.monotonic() - start < 10
    check_tracking(TrackingConfig(uri=f"sqlite:///{tmp_path / 'new.db'}"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "foreign.db"]


@pytest.mark.slow
def test_without_tracking_mlflow_is_never_imported(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from dop_search.app.config import TrackingConfig;"
        "from support.records import example_record; from dop_search.app.tracking.store import *;"
        "import dop_search.app.tracking.connection as n; c = TrackingConfig(backend='none'); n.check_tracking(c);"
        f"assert log_search(c, example_record(), Path({str(tmp_path)!r})) is None;"
        "sys.exit('mlflow' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, env=WITH_SUPPORT).returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_a_new_store_is_made_in_silence(logged: Logged) -> None:
    assert logged.printed == ""


def test_a_benchmark_is_one_run_with_its_numbers_by_variant(logged: Logged) -> None:
    config = TrackingConfig(uri=f"sqlite:///{logged.folder / 'sub' / 'mlflow.db'}")
    row = {"target_ratio": 0.3, "name": "hooks at layer 2", "flops_ratio": 0.301}
    medians = {"prefill_ms": {"median": 12.5}, "peak_bytes": None}
    data = {
        "what": "tiny",
        "text_tokens": 6,
        "visual_tokens": 64,
        "generated_tokens": 2,
        "environment": {"device": "cpu", "attn_implementation": "sdpa"},
        "rows": [{**row, "median": medians, "ratio": {"prefill_ms": {"median": 0.33}}}],
    }
    identifier = log_benchmark(config, data)
    run = logged.client.get_run(identifier)
    assert run.data.metrics == {
        "0.3_hooks_at_layer_2/flops_ratio": 0.301,
        "0.3_hooks_at_layer_2/prefill_ms_median": 12.5,
        "0.3_hooks_at_layer_2/prefill_ms_ratio": 0.33,
    }
    assert run.data.params["attn_implementation"] == "sdpa"
    assert [item.path for item in logged.client.list_artifacts(identifier)] == ["benchmark.json"]
    assert log_benchmark(TrackingConfig(backend="none"), data) is None


@pytest.mark.slow
def test_a_study_that_was_logged_halfway_is_logged_again_and_a_whole_one_is_not(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    config = TrackingConfig(uri=store)
    rows = [{"method": name, "budget": 0.5, "asked": {"what's (this)?": 3}} for name in ("a", "b")]
    result = {"study": "invented", "setup": {"model": "m"}, "rows": rows, "summary": {"best": "a"}}
    terminate = MlflowClient.set_terminated

    def interrupted(self: Any, run: str, **options: Any) -> None:
        terminate(self, run, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "set_terminated", interrupted)
        with pytest.raises(KeyboardInterrupt):
            log_study(config, result, tmp_path)
    parent = log_study(config, result, tmp_path)
    assert parent is not None
    client = MlflowClient(config.uri)
    experiment = client.get_run(parent).info.experiment_id
    nested = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert len(nested) == 2
    assert nested[0].data.metrics == {"budget": 0.5, "asked/what_s _this__": 3.0}
    assert log_study(config, result, tmp_path) is None
    assert log_study(config, {**result, "summary": {"best": "b"}}, tmp_path) is not None


@pytest.mark.slow
def test_processes_that_end_together_on_a_new_store_all_log(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'new' / 'mlflow.db'}"
    config, record = TrackingConfig(uri=uri), example_record()
    processes = [forked(log_search, config, record, tmp_path) for _ in range(2)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    from mlflow.tracking import MlflowClient

    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name(TrackingConfig().experiment)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], max_results=100)
    assert sum("mlflow.parentRunId" not in run.data.tags for run in runs) == 2


def test_a_store_that_is_away_at_the_end_costs_no_result(
    store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sqlalchemy.exc import OperationalError

    from dop_search.app.cli.finished import track as main
    from dop_search.app.tracking import connection

    def away(*_: object) -> str:
        raise OperationalError("SELECT 1", {}, OSError("server closed the connection"))

    record, config = example_record(), TrackingConfig(uri=store)
    record.save(tmp_path / RECORD_FILE)
    with monkeypatch.context() as patch:
        patch.setattr(connection, "_experiment", away)
        with pytest.raises(ConfigError, match=r"refused the run.*the results are in .*dop-track"):
            log_search(config, record, tmp_path)
    assert main([str(tmp_path), "--uri", config.uri]) == 0
    identifier = capsys.readouterr().out.split("run ")[1].split()[0]
    from mlflow.tracking import MlflowClient

    run = MlflowClient(config.uri).get_run(identifier)
    assert record.provenance is not None
    assert run.info.start_time == started_ms(record.provenance)
    assert run.info.end_time - run.info.start_time == pytest.approx(1000 * record.seconds, abs=1)
    assert "| budget |" in run.data.tags["mlflow.note.content"]
    assert str(record.data.seed) in run.info.run_name
    assert run.data.metrics["lowest/kl_heldout"] == min(result.kl_heldout for result in record.results)


def test_the_experiment_opens_on_its_runs(logged: Logged) -> None:
    experiment = logged.client.get_experiment_by_name(TrackingConfig().experiment)
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"


@pytest.mark.slow
@pytest.mark.service("MLflow server")
def test_a_server_is_logged_to_without_a_line_per_run_and_opens_where_we_say(
    mlflow_server: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    record, config = example_record(), TrackingConfig(uri=mlflow_server)
    record.save(tmp_path / RECORD_FILE)
    assert log_search(config, record, tmp_path) is not None
    assert capfd.readouterr().out == ""
    line = ui_command(config)
    assert line is not None
    assert line.startswith(f"{mlflow_server}/#/experiments/1/runs?")
    with urllib.request.urlopen(line, timeout=10) as answer:
        assert b"<title>MLflow" in answer.read()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server)
    assert Strategy.load("models:/pocket-flops_ratio-0.3/1") == record.results[1].strategy
