"""The evaluation store: nothing is evaluated twice, whatever happens to the process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from invented_problems import counted, interacting_evaluator, make_space

from dop_search.search import EvaluationStore
from dop_search.strategy import Strategy
from dop_search.utils.errors import CacheError, DataError, NumericalError

SPACE = make_space("dop", 4, 12)
STRATEGIES = [SPACE.strategy({"attention_depth": a, "num_visual_tokens": n}) for a in range(5) for n in (3, 7, 12)]
EXACT = interacting_evaluator(SPACE, 6)
HEADER = {"model": "m-1", "data": "d-1"}


def test_values_are_the_evaluators_and_each_is_computed_once() -> None:
    evaluator, calls = counted(EXACT)
    store = EvaluationStore(evaluator, 6, batch_size=4)
    seen: list[tuple[int, int | None]] = []
    twice = [*STRATEGIES, *STRATEGIES[:5]]
    values = store.evaluate(twice, on_progress=lambda done, total, what: seen.append((done, total)))
    np.testing.assert_array_equal(values, EXACT(twice, None))
    distinct = len({strategy.key() for strategy in STRATEGIES})
    assert sum(calls) == 6 * distinct
    assert max(calls) == 6 * 4
    assert store.num_validation_runs == store.num_new_runs == distinct == len(store)
    assert seen[0] == (0, distinct)
    assert seen[-1] == (distinct, distinct)
    store.evaluate(STRATEGIES)
    assert sum(calls) == 6 * distinct


def test_means_count_the_strategies_of_all_calls() -> None:
    seen: list[tuple[int, int | None, str]] = []
    means = EvaluationStore(EXACT, 6, batch_size=4).means(lambda *heard: seen.append(heard), "a long search")
    for start in (0, 5, 8):
        its = STRATEGIES[start : start + 6]
        np.testing.assert_allclose(means(its), EXACT(its, None).mean(axis=1))
    assert seen[-1] == (18, None, "a long search")
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)


def test_parts_of_the_samples_add_up() -> None:
    evaluator, calls = counted(EXACT)
    store = EvaluationStore(evaluator, 6)
    part = store.evaluate(STRATEGIES[:1], [4, 1])
    np.testing.assert_array_equal(part, EXACT(STRATEGIES[:1], [4, 1]))
    assert (store.num_validation_runs, sum(calls)) == (1, 2)
    np.testing.assert_array_equal(store.evaluate(STRATEGIES[:1]), EXACT(STRATEGIES[:1], None))
    assert (store.num_validation_runs, sum(calls)) == (1, 6)  # only the four missing samples


def test_a_file_is_continued(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    first = EvaluationStore(EXACT, 6, path, HEADER)
    before = first.evaluate(STRATEGIES[:7])
    first.evaluate(STRATEGIES[7:8], [2])
    evaluator, calls = counted(EXACT)
    second = EvaluationStore(evaluator, 6, path, HEADER)
    np.testing.assert_array_equal(second.evaluate(STRATEGIES[:7]), before)
    assert calls == []
    np.testing.assert_array_equal(second.evaluate(STRATEGIES), EXACT(STRATEGIES, None))
    assert second.num_validation_runs == len({s.key() for s in STRATEGIES})
    assert second.num_new_runs < second.num_validation_runs


def test_what_another_process_saves_meanwhile_is_not_evaluated_again(tmp_path: Path) -> None:
    """While the first batch is evaluated, another process saves all of the second and a part of the third."""
    path = tmp_path / "evaluations.jsonl"
    distinct = list({strategy.key(): strategy for strategy in STRATEGIES}.values())[:9]
    asked: list[list[str]] = []

    def evaluator(strategies: Sequence[Strategy], samples: Sequence[int] | None) -> np.ndarray:
        if not asked:
            EvaluationStore(EXACT, 6, path, HEADER).evaluate(distinct[3:7])
        asked.append([strategy.key() for strategy in strategies])
        assert samples is None or len(samples)
        return EXACT(strategies, samples)

    values = EvaluationStore(evaluator, 6, path, HEADER, batch_size=3).evaluate(distinct)
    np.testing.assert_array_equal(values, EXACT(distinct, None))
    assert asked == [[s.key() for s in part] for part in (distinct[:3], distinct[7:9])]


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "evaluations.jsonl"
    EvaluationStore(EXACT, 6, path, HEADER, batch_size=1).evaluate(STRATEGIES[:3])
    path.write_bytes(path.read_bytes()[:-cut])
    evaluator, calls = counted(EXACT)
    store = EvaluationStore(evaluator, 6, path, HEADER)
    np.testing.assert_array_equal(store.evaluate(STRATEGIES[:3]), EXACT(STRATEGIES[:3], None))
    assert sum(calls) == 6
    assert all(json.loads(line) for line in path.read_text().splitlines())


def test_a_torn_header_is_written_again(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"format": "dop_se')
    store = EvaluationStore(EXACT, 6, path, HEADER)
    store.evaluate(STRATEGIES[:1])
    assert json.loads(path.read_text().splitlines()[0])["model"] == "m-1"


def test_foreign_and_corrupt_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    EvaluationStore(EXACT, 6, path, HEADER).evaluate(STRATEGIES[:2])
    with pytest.raises(
        CacheError, match=r"belongs to another search \(data: file 'd-1', now 'd-2'\).*delete that file"
    ):
        EvaluationStore(EXACT, 6, path, {**HEADER, "data": "d-2"})
    with pytest.raises(CacheError, match="num_samples: file 6, now 7"):
        EvaluationStore(EXACT, 7, path, HEADER)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([lines[0], "garbage\n", lines[1]]))
    with pytest.raises(CacheError, match="corrupt at byte"):
        EvaluationStore(EXACT, 6, path, HEADER)
    for text in ("hello", "hello\nworld\n", '{"a": 1}\n'):
        path.write_text(text)
        with pytest.raises(CacheError, match="is not an evaluation file"):
            EvaluationStore(EXACT, 6, path, HEADER)
        assert path.read_text() == text  # a file that is not ours is left alone


def test_nan_is_an_error_and_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"

    def broken(strategies: object, samples: object) -> np.ndarray:
        return np.array([[0.1, np.nan]])

    store = EvaluationStore(broken, 2, path)
    with pytest.raises(NumericalError, match="on sample 1 is nan"):
        store.evaluate(STRATEGIES[:1])
    assert len(path.read_text().splitlines()) == 1
    with pytest.raises(DataError, match="at least one validation sample"):
        EvaluationStore(broken, 0)


def test_two_processes_share_a_file(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    evaluator, calls = counted(EXACT)
    one = EvaluationStore(EXACT, 6, path, HEADER)
    two = EvaluationStore(evaluator, 6, path, HEADER)
    one.evaluate(STRATEGIES[:4])
    two.evaluate(STRATEGIES[:5])
    assert sum(calls) == 6  # what `one` has saved meanwhile is known to `two`
    three = EvaluationStore(evaluator, 6, path, HEADER)
    np.testing.assert_array_equal(three.evaluate(STRATEGIES[:5]), EXACT(STRATEGIES[:5], None))
    assert sum(calls) == 6


CHILD = """
import sys, time
sys.path.insert(0, {tests!r})
from invented_problems import interacting_evaluator, make_space
from dop_search.search import Curves, CurveGrid, EvaluationStore
space = make_space("dop_split", 6, 24)
exact = interacting_evaluator(space, 8)
def evaluator(strategies, samples):
    with open({log!r}, "a") as file:
        file.writelines(s.key() + chr(10) for s in strategies)
    time.sleep({delay})
    return exact(strategies, samples)
store = EvaluationStore(evaluator, 8, {path!r}, {{"data": 1}}, batch_size=2)
curves = Curves.measure(space, store)
curves.save({result!r})
print(store.num_validation_runs, store.num_new_runs)
"""


@pytest.mark.slow
def test_a_killed_profile_continues_without_repeating_a_run(tmp_path: Path) -> None:
    def start(name: str, delay: float) -> subprocess.Popen[str]:
        text = CHILD.format(
            tests=str(Path(__file__).parent),
            log=str(tmp_path / f"{name}.log"),
            path=str(tmp_path / f"{name}.jsonl"),
            result=str(tmp_path / f"{name}.parquet"),
            delay=delay,
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        return subprocess.Popen([sys.executable, "-c", text], stdout=subprocess.PIPE, text=True, env=environment)

    straight, _ = start("straight", 0.0).communicate(timeout=60)

    killed = start("killed", 0.3)
    path = tmp_path / "killed.jsonl"
    deadline = time.monotonic() + 60
    while (not path.exists() or len(path.read_text().splitlines()) < 6) and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    saved = len(path.read_text().splitlines()) - 1
    assert saved >= 5
    resumed, _ = start("killed", 0.0).communicate(timeout=60)

    runs, new = map(int, resumed.split())
    assert runs == int(straight.split()[0])
    assert new <= runs - saved + 1
    evaluated = (tmp_path / "killed.log").read_text().split("\n")[:-1]
    assert len(evaluated) - len(set(evaluated)) <= 2  # at most the batch that was in the works
    finished = {json.loads(line)["key"] for line in path.read_text().splitlines()[1 : saved + 1]}
    again = evaluated[len(evaluated) - new :]
    assert not finished & set(again)
    assert (tmp_path / "killed.parquet").read_bytes() == (tmp_path / "straight.parquet").read_bytes()


# -- checksums ------------------------------------------------------------------------------------


def test_every_flipped_bit_of_a_line_is_noticed_or_changes_nothing(tmp_path: Path) -> None:
    """Those that leave a line JSON, and numbers in it, included; ``1e-05`` and ``1E-05`` are the same number."""
    path = tmp_path / "evaluations.jsonl"
    EvaluationStore(EXACT, 6, path, HEADER).evaluate(STRATEGIES[:2])
    whole, messages = path.read_bytes(), []
    start = whole.index(b"\n") + 1
    for place in range(start, len(whole) - 1):
        for bit in range(8):
            byte = whole[place] ^ (1 << bit)
            path.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
            try:
                store = EvaluationStore(None, 6, path, HEADER)
            except CacheError as error:
                messages.append(str(error))
            else:
                np.testing.assert_array_equal(store.evaluate(STRATEGIES[:2]), EXACT(STRATEGIES[:2], None))
    assert len(messages) > 7.9 * (len(whole) - start - 1)
    assert all("is corrupt at byte" in text and "delete that file, or set another" in text for text in messages)


def test_files_without_checksums_are_read(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    EvaluationStore(EXACT, 6, path, HEADER).evaluate(STRATEGIES[:2])
    header, *lines = (json.loads(line) for line in path.read_text().splitlines())
    old = [{name: line[name] for name in ("key", "samples", "kl_nats")} for line in lines]
    path.write_text("".join(json.dumps(line) + "\n" for line in [header, *old]))
    evaluator, calls = counted(EXACT)
    store = EvaluationStore(evaluator, 6, path, HEADER)
    np.testing.assert_array_equal(store.evaluate(STRATEGIES[:2]), EXACT(STRATEGIES[:2], None))
    assert not calls


@pytest.mark.parametrize(
    "change",
    [
        {"kl_nats": 0.5},
        {"kl_nats": [0.5]},
        {"kl_nats": [0.5, 0.1, 0.2, 0.3, 0.4, float("nan")]},
        {"kl_nats": ["a"] * 6},
        {"samples": [0, 1, 2, 3, 4, -1]},
        {"samples": [0, 1, 2, 3, 4, 6]},
        {"samples": 0},
        {"key": 1},
        {"more": 1},
    ],
)
def test_a_line_without_a_checksum_is_not_believed_blindly(tmp_path: Path, change: dict) -> None:
    path = tmp_path / "evaluations.jsonl"
    EvaluationStore(EXACT, 6, path, HEADER).evaluate(STRATEGIES[:1])
    header, line = path.read_text().splitlines()
    record = json.loads(line)
    del record["crc32"]
    path.write_text(f"{header}\n{json.dumps({**record, **change})}\n")
    with pytest.raises(CacheError, match="corrupt at byte"):
        EvaluationStore(EXACT, 6, path, HEADER)
