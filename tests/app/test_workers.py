"""Two processes on one search: one is killed, the other ends with what a lone one finds."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from support.forked import forked

from dop_search.app.config import SearchConfig
from dop_search.app.record import Record
from dop_search.app.search import run
from dop_search.search.optuna_study import open_storage
from dop_search.utils.progress import Progress

pytestmark = pytest.mark.slow

SMALL = {
    "data": {"num_samples": 6, "num_heldout": 6, "num_test": 0},
    "space": {"name": "dop_split", "num_depth_levels": 4, "num_token_levels": 4},
    "search": {"solver": "additive_exact", "num_rerank": 6},
    "tracking": {"backend": "none"},
    "eval": {"name": "none"},
    "budget": [0.3],
}


@pytest.fixture(autouse=True)
def _one_way_to_multiply(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each run measures whether oneDNN is faster; where two decide differently, numbers agree to rounding only."""
    monkeypatch.setattr("dop_search.models.fast_linear.MIN_SPEEDUP", float("inf"))


def without_times(record: Record) -> dict[str, Any]:
    """All of a record but how long it took and who made it."""
    data = record.model_dump(mode="json", exclude={"seconds", "timings", "provenance"})
    for result in data["results"]:
        del result["seconds"], result["strategy"]["provenance"]["search_id"]
    return data


def claims(where: Path, state: TrialState) -> list[dict[str, Any]]:
    """The claims of all studies of a storage."""
    storage = open_storage(where, bookkeeping=True)
    names = [name for name in optuna.get_all_study_names(storage) if "/claims/" in name]
    studies = [optuna.load_study(study_name=name, storage=storage) for name in names]
    return [trial.user_attrs for study in studies for trial in study.get_trials(states=(state,))]


def test_a_killed_worker_is_replaced_and_the_record_is_that_of_a_lone_run(tmp_path: Path) -> None:
    where = tmp_path / "shared.journal"
    small = {**SMALL, "cache_dir": str(tmp_path / "cache"), "num_threads": 1}
    lone = run(SearchConfig.model_validate(small), tmp_path / "lone", Progress())
    shared = SearchConfig.model_validate({**small, "storage": str(where)})
    workers = {name: forked(run, shared, tmp_path / name, Progress()) for name in ("one", "two")}
    deadline = time.monotonic() + 120
    held: list[str] = []
    while not held:  # until somebody has claimed strategies and the search has got somewhere
        assert time.monotonic() < deadline
        if len(claims(where, TrialState.COMPLETE)) >= 2:
            held = [claim["worker"] for claim in claims(where, TrialState.RUNNING)]
        time.sleep(0.005)
    victim = next(name for name, process in workers.items() if f":{process.pid}:" in held[0])
    os.kill(workers[victim].pid, signal.SIGKILL)
    workers[victim].join()
    (survivor,) = set(workers) - {victim}
    workers[survivor].join(timeout=120)
    assert workers[survivor].exitcode == 0

    assert not (tmp_path / victim / "record.json").exists()
    record = Record.load(tmp_path / survivor)
    assert without_times(record) == without_times(lone)
    assert (tmp_path / survivor / "curves.parquet").read_bytes() == (tmp_path / "lone" / "curves.parquet").read_bytes()
    assert optuna.get_all_study_names(open_storage(where)) == [], "what a person opens has no bookkeeping"
    storage = open_storage(where, bookkeeping=True)
    keys = []
    for summary in optuna.get_all_study_summaries(storage):
        if "/claims/" not in summary.study_name:
            study = optuna.load_study(study_name=summary.study_name, storage=storage)
            keys += [(summary.study_name, trial.user_attrs["key"]) for trial in study.trials]
    assert len(keys) == len(set(keys)), "nothing that was saved was evaluated again"
    workers_of = {claim["worker"] for claim in claims(where, TrialState.COMPLETE)}
    assert any(f":{workers[survivor].pid}:" in name for name in workers_of)
