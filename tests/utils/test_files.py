"""Files that cannot be written, and what killed writers leave."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from dop_search.search import EvaluationStore
from dop_search.strategy import Strategy
from dop_search.utils.errors import WriteError
from dop_search.utils.files import check_writable, sweep, write_atomic, write_text_atomic


@pytest.fixture
def full_disk():
    """No file of this process can grow beyond 4 KiB; the kernel says so as it does for a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
    signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path, full_disk):
    write_text_atomic(tmp_path / "a.json", "old")
    with pytest.raises(WriteError, match=r"cannot write '.*a\.json': File too large; what was saved before is whole"):
        write_text_atomic(tmp_path / "a.json", "x" * 10_000)
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "old"


def test_a_folder_that_cannot_be_written_is_noticed_before_anything_is_computed(tmp_path, full_disk):
    with pytest.raises(
        WriteError, match=r"cache_dir='.*' cannot be written: File too large; .*nothing has been computed"
    ):
        check_writable(tmp_path, "cache_dir")
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file" / "cache", tmp_path / "file"):
        with pytest.raises(WriteError, match=r"cache_dir=.* cannot be written: (Not a directory|File exists)"):
            check_writable(folder, "cache_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_evaluations_on_a_disk_that_fills_up_are_continued(tmp_path, full_disk):
    """What was saved is whole, what was not is measured again once there is space."""
    strategies = [Strategy.depthwise(40, depth, depth, depth) for depth in range(40)]
    asked = []

    def evaluator(chosen, samples):
        asked.extend(strategy.key() for strategy in chosen)
        return np.array([[strategy.depths()["q"][0] + 0.1] * 3 for strategy in chosen])

    path = tmp_path / "evaluations.jsonl"
    store = EvaluationStore(evaluator, 3, path, batch_size=4)
    with pytest.raises(WriteError, match=r"cannot write '.*evaluations\.jsonl'.*run the same command again"):
        store.evaluate(strategies)
    before = len(asked)
    assert 4 < before < 40
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit[1], limit[1]))
    values = EvaluationStore(evaluator, 3, path, batch_size=4).evaluate(strategies)
    np.testing.assert_array_equal(values[:, 0], np.arange(40) + 0.1)
    assert len(asked) <= 40 + 4, "at most the batch that was not saved is measured again"


def test_what_killed_writers_leave_is_swept(tmp_path):
    script = (
        "import os, signal; from pathlib import Path; from dop_search.utils.files import write_atomic\n"
        f"write_atomic(Path({str(tmp_path / 'a.json')!r}), lambda path: os.kill(os.getpid(), signal.SIGKILL))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    own = []
    write_atomic(tmp_path / "b.json", lambda path: own.append((sweep(tmp_path), path.exists())))
    assert own == [(None, True)], "a file that is being written stays"
    assert not left.exists()
    for name, age_h in ((".c.json~elsewhere:1~abc.json", 25), (".d.json~elsewhere:1~abc.json", 1), (".mine~.json", 99)):
        (tmp_path / name).write_text("")
        os.utime(tmp_path / name, (time.time() - 3600 * age_h,) * 2)
    check_writable(tmp_path, "cache_dir")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"b.json", ".d.json~elsewhere:1~abc.json", ".mine~.json"}
