"""The result of a study: rows are measured once, by one process, and errors stay where they belong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from dop_search.app.results import ResultFile
from dop_search.utils.errors import BudgetError, ConfigError, DataError


class Silent:
    def __init__(self) -> None:
        self.last: tuple[int, int] | None = None

    def __call__(self, done: int, total: int, what: str = "") -> None:
        self.last = (done, total)


KEYS = [{"method": name, "budget": budget} for name in ("a", "b") for budget in (0.5, 0.25)]


def opened(folder: Path, setup: dict[str, object] | None = None) -> ResultFile:
    return ResultFile(folder, "invented", setup or {"model": "m"})


def test_rows_are_measured_once_and_read_back_with_their_samples(tmp_path: Path) -> None:
    calls = []

    def measure(method: str, budget: float) -> tuple[dict[str, object], np.ndarray]:
        calls.append((method, budget))
        return {"kl": np.float64(budget), "ci": (0.0, 1.0)}, np.array([budget, 1.0])

    notify = Silent()
    rows = opened(tmp_path).measure(KEYS, measure, notify, "rows")  # type: ignore[arg-type]
    assert notify.last == (4, 4)
    assert [(row["method"], row["budget"], row["kl"]) for row in rows] == [
        ("a", 0.5, 0.5),
        ("a", 0.25, 0.25),
        ("b", 0.5, 0.5),
        ("b", 0.25, 0.25),
    ]
    again = opened(tmp_path)
    before = (tmp_path / "result.json").read_text()
    assert again.measure(KEYS, measure, Silent(), "rows") == rows  # type: ignore[arg-type]
    assert len(calls) == 4
    assert (tmp_path / "result.json").read_text() == before
    samples = again.per_sample(KEYS[1])
    assert samples is not None
    assert samples.tolist() == [0.25, 1.0]


def test_reasons_and_failures_lose_no_other_row_and_failures_are_tried_again(tmp_path: Path) -> None:
    broken = True

    def measure(method: str, budget: float) -> dict[str, float]:
        if method == "a" and budget == 0.25:
            raise BudgetError("cannot go below 0.4")
        if method == "b" and broken:
            raise RuntimeError("out of memory")
        return {"kl": budget}

    rows = opened(tmp_path).measure(KEYS, measure, Silent(), "rows")  # type: ignore[arg-type]
    assert "kl" in rows[0]
    assert rows[1]["infeasible"] == "cannot go below 0.4"
    assert rows[2]["failed"] == rows[3]["failed"] == "RuntimeError: out of memory"
    broken = False
    rows = opened(tmp_path).measure(KEYS, measure, Silent(), "rows")  # type: ignore[arg-type]
    assert [("kl" in row) for row in rows] == [True, False, True, True]
    assert len(json.loads((tmp_path / "result.json").read_text())["rows"]) == 4


def test_a_mistake_of_the_users_ends_the_study_and_is_no_row(tmp_path: Path) -> None:
    def measure(method: str, budget: float) -> dict[str, float]:
        if method == "b":
            raise DataError("no such family")
        return {"kl": budget}

    with pytest.raises(DataError, match="no such family"):
        opened(tmp_path).measure(KEYS, measure, Silent(), "rows")  # type: ignore[arg-type]
    rows = opened(tmp_path).measure(KEYS, lambda method, budget: {"kl": budget}, Silent(), "rows")  # type: ignore[arg-type]
    assert all("kl" in row for row in rows)


def test_another_setup_or_a_foreign_file_is_refused(tmp_path: Path) -> None:
    opened(tmp_path).add(KEYS[0], {"kl": 1.0})
    with pytest.raises(ConfigError, match=r"model: file 'm', now 'other'.*study\.folder"):
        opened(tmp_path, {"model": "other"})
    (tmp_path / "result.json").write_text("{}")
    with pytest.raises(ConfigError, match="not a study's result"):
        opened(tmp_path)


def test_a_killed_process_leaves_its_rows_to_another(tmp_path: Path) -> None:
    script = f"""
import time
from pathlib import Path
from dop_search.app.results import ResultFile

def measure(method, budget):
    Path({str(tmp_path / "started")!r}).write_text(method)
    time.sleep(60)

ResultFile(Path({str(tmp_path)!r}), "invented", {{"model": "m"}}).measure(
    [{{"method": "a", "budget": 0.5}}], measure, lambda *args, **kwargs: None, "rows", group=("method",)
)
"""
    other = subprocess.Popen([sys.executable, "-c", script])
    try:
        deadline = time.monotonic() + 60
        while not (tmp_path / "started").exists():
            assert other.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert not opened(tmp_path)._take('{"method": "a"}')
        other.send_signal(signal.SIGKILL)  # and not waited for: a zombie has a number still
        rows = opened(tmp_path).measure(
            KEYS,
            lambda method, budget: {"kl": budget},
            Silent(),  # type: ignore[arg-type]
            "rows",
            group=("method",),
        )
        assert [row["kl"] for row in rows] == [0.5, 0.25, 0.5, 0.25]
    finally:
        other.kill()
        other.wait()


def test_two_processes_share_the_rows(tmp_path: Path) -> None:
    script = f"""
import os, time
from pathlib import Path
from dop_search.app.results import ResultFile

def measure(index):
    time.sleep(0.1)
    return {{"process": os.getpid()}}

folder = Path({str(tmp_path)!r})
(folder / str(os.getpid())).write_text("ready")
while len([path for path in folder.iterdir() if path.name.isdigit()]) < 2:
    time.sleep(0.01)
keys = [{{"index": index}} for index in range(12)]
rows = ResultFile(folder, "invented", {{"model": "m"}}).measure(keys, measure, lambda *a, **k: None, "rows")
assert [row["index"] for row in rows] == list(range(12))
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert sorted(row["index"] for row in rows) == list(range(12))
    assert {row["process"] for row in rows} == {process.pid for process in processes}
