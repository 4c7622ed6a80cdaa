"""Several processes on one search: nothing is done twice, nothing is lost with a killed one, one answer for all."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path

import numpy as np
import optuna
import pytest
from invented_problems import interacting_evaluator, make_space, pocket_problem

from dop_search.search import Curves, EvaluationStore, Problem, rerank_all, solve
from dop_search.search.optuna_study import FINISHED, open_storage
from dop_search.search.shared_store import CHUNK_SIZE, SharedEvaluationStore
from dop_search.search.sharing import Claims, Worker
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import CacheError, ConfigError, NumericalError

BUDGET = Budget(flops_ratio=0.35)
NUM_SAMPLES = 8
FORK = multiprocessing.get_context("fork")
optuna.logging.set_verbosity(optuna.logging.WARNING)


def logged(problem: Problem, log: Path, delay_s: float):
    """The invented divergence, which writes down who evaluates what before it does."""
    exact = interacting_evaluator(problem.space, NUM_SAMPLES)

    def evaluate(strategies: Sequence[Strategy], samples: Sequence[int] | None) -> np.ndarray:
        part = range(NUM_SAMPLES) if samples is None else samples
        lines = [f"{os.getpid()}\t{strategy.key()}\t{sample}\n" for strategy in strategies for sample in part]
        with open(log, "a") as file:
            file.write("".join(lines))
        time.sleep(delay_s)
        return exact(strategies, samples)

    return evaluate


def profile_and_rerank(problem: Problem, store: EvaluationStore) -> dict[str, object]:
    """What a search asks for: curves, then the best candidates of several budgets."""
    curves = Curves.measure(problem.space, store)
    problem = replace(problem, surrogate=curves.surrogate(problem.space), store=store)
    found = [rerank_all(problem, Budget(flops_ratio=ratio), 8)[0] for ratio in (0.6, 0.35, 0.2)]
    return {
        "curves": {name: curve.per_sample_nats.tolist() for name, curve in curves.curves.items()},
        "found": [[solution.strategy.key(), solution.per_sample_nats.tolist()] for solution in found],
        "runs": store.num_validation_runs,
    }


def search_worker(location: str, folder: Path, number: int, delay_s: float) -> None:
    problem = pocket_problem("dop_split", num_samples=NUM_SAMPLES)
    store = SharedEvaluationStore(logged(problem, folder / "log", delay_s), NUM_SAMPLES, location, "study", {"data": 1})
    result = profile_and_rerank(problem, store)
    (folder / f"result-{number}.json").write_text(json.dumps(result))


def study_worker(location: str, folder: Path, number: int, delay_s: float) -> None:
    problem = pocket_problem("dop", num_tokens=12, num_samples=NUM_SAMPLES)
    store = SharedEvaluationStore(logged(problem, folder / "log", delay_s), NUM_SAMPLES, location, "kl", {"data": 1})
    options = {"num_trials": 10, "num_warm_start": 3, "sampler": "random", "pruner": "median", "num_chunks": 2}
    found = solve("exact_optuna", replace(problem, store=store), BUDGET, storage=location, **options)
    result = {"key": found.strategy.key(), "nats": found.kl_search, "trials": len(found.history)}
    (folder / f"result-{number}.json").write_text(json.dumps(result))


@pytest.fixture(params=["journal", pytest.param("postgres", marks=pytest.mark.service("PostgreSQL"))])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "journal":
        return str(tmp_path / "shared.journal")
    new_database: Callable[[], str] = request.getfixturevalue("new_database")
    return new_database()


def start(target: Callable[..., None], location: str, folder: Path, delay_s: float) -> list[ForkProcess]:
    """Three at once on a storage that does not exist yet."""
    processes = [FORK.Process(target=target, args=(location, folder, number, delay_s)) for number in range(3)]
    for process in processes:
        process.start()
    return processes


def lines(folder: Path) -> list[list[str]]:
    log = folder / "log"
    return [line.split("\t") for line in log.read_text().splitlines()] if log.exists() else []


def kill_in_the_middle(processes: list[ForkProcess], folder: Path, after: int) -> int:
    """``kill -9`` to a process that is evaluating; its id."""
    deadline = time.monotonic() + 60
    while len(seen := lines(folder)) < after and time.monotonic() < deadline:
        time.sleep(0.01)
    victim = int(seen[-1][0])
    os.kill(victim, signal.SIGKILL)
    next(process for process in processes if process.pid == victim).join()  # else it stays in the process table
    return victim


def results(processes: list[ForkProcess], folder: Path) -> list[dict[str, object]]:
    for process in processes:
        process.join(timeout=60)
    codes = [process.exitcode for process in processes]
    assert set(codes) <= {0, -signal.SIGKILL}
    return [json.loads((folder / f"result-{n}.json").read_text()) for n, code in enumerate(codes) if code == 0]


def test_workers_share_a_search_and_each_run_is_done_once(tmp_path: Path) -> None:
    location = str(tmp_path / "shared.journal")
    problem = pocket_problem("dop_split", num_samples=NUM_SAMPLES)
    lone = profile_and_rerank(problem, EvaluationStore(interacting_evaluator(problem.space, NUM_SAMPLES), NUM_SAMPLES))
    found = results(start(search_worker, location, tmp_path, 0.1), tmp_path)
    assert found == [lone] * 3
    seen = lines(tmp_path)
    assert set(Counter((key, sample) for _, key, sample in seen).values()) == {1}
    assert len(seen) == lone["runs"] * NUM_SAMPLES
    assert len({process for process, _, _ in seen}) >= 2


@pytest.mark.slow
def test_a_killed_worker_loses_at_most_what_it_had_claimed(location: str, tmp_path: Path) -> None:
    problem = pocket_problem("dop_split", num_samples=NUM_SAMPLES)
    lone = profile_and_rerank(problem, EvaluationStore(interacting_evaluator(problem.space, NUM_SAMPLES), NUM_SAMPLES))
    processes = start(search_worker, location, tmp_path, 0.1)
    victim = kill_in_the_middle(processes, tmp_path, after=12 * NUM_SAMPLES)
    assert results(processes, tmp_path) == [lone] * 2
    runs = Counter((key, sample) for _, key, sample in lines(tmp_path))
    twice = {key for (key, _), count in runs.items() if count > 1}
    assert max(runs.values()) <= 2
    assert len(twice) <= CHUNK_SIZE
    assert twice <= {key for process, key, _ in lines(tmp_path) if int(process) == victim}
    assert len(runs) == lone["runs"] * NUM_SAMPLES


@pytest.mark.slow
@pytest.mark.parametrize("kill", [False, True], ids=["all live", "one is killed"])
def test_workers_share_a_study(location: str, tmp_path: Path, kill: bool) -> None:
    processes = start(study_worker, location, tmp_path, 0.05)
    victim = kill_in_the_middle(processes, tmp_path, after=4 * NUM_SAMPLES) if kill else None
    found = results(processes, tmp_path)
    assert len(found) == (2 if kill else 3)
    assert all(result == found[0] for result in found), "every worker returns the same"
    assert found[0]["trials"] == 10
    study = optuna.load_study(study_name="dop_search", storage=open_storage(location))
    assert len(study.get_trials(states=FINISHED)) == 10
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    warm = [trial for trial in study.get_trials(states=FINISHED) if "warm_start" in trial.user_attrs]
    assert len({str(trial.params) for trial in warm}) == len(warm) == len(study.user_attrs["warm_start"]), (
        "the warm start is done once"
    )
    done = [trial.params for trial in study.get_trials(states=FINISHED)]
    lost = [trial for trial in study.get_trials(states=(optuna.trial.TrialState.FAIL,)) if trial.params]
    assert all(trial.params in done for trial in lost), "what was lost was done again"
    runs = Counter((key, sample) for _, key, sample in lines(tmp_path))
    twice = {(key, sample) for (key, sample), count in runs.items() if count > 1}
    assert twice <= {(key, sample) for process, key, sample in lines(tmp_path) if int(process) == victim}
    best = min(trial.value for trial in study.get_trials(states=FINISHED) if trial.user_attrs["candidate"]["fits"])
    assert found[0]["nats"] == pytest.approx(best)


# -- who is alive, who holds what -----------------------------------------------------------------


def test_of_overlapping_claims_the_earlier_holds() -> None:
    storage = optuna.storages.InMemoryStorage()
    one, two = Claims(storage, "x"), Claims(storage, "x")
    with one, two:
        with one.claim(["a", "b"]) as first, two.claim(["b", "c"]) as second:
            assert (first, second) == (["a", "b"], ["c"])
            assert two.taken() == {"a", "b", "c"}
        assert two.taken() == set()
        with pytest.raises(ZeroDivisionError), one.claim(["a"]):
            raise ZeroDivisionError
        with two.claim(["a"]) as again:
            assert again == ["a"]


def test_a_silent_worker_of_another_host_is_dead_and_a_beating_one_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    storage = optuna.storages.InMemoryStorage()
    far = Claims(storage, "x", heartbeat_s=0.05)
    far.worker.name = "elsewhere:1:cafe"
    near = Claims(storage, "x", heartbeat_s=0.05, grace_s=0.3)
    claim = far.claim(["a"])
    far.__enter__()
    claim.__enter__()
    until = time.monotonic() + 0.8
    while time.monotonic() < until:
        assert near.taken() == {"a"}
        time.sleep(0.05)
    monkeypatch.setattr(far._study, "set_user_attr", lambda *attribute: None)  # its machine has lost power
    start = time.monotonic()
    while near.taken():
        assert time.monotonic() - start < 5
        time.sleep(0.05)
    assert time.monotonic() - start > 0.2
    with near, near.claim(["a"]) as mine:
        assert mine == ["a"]
    far.__exit__()


def test_a_worker_that_left_or_was_killed_is_dead_at_once() -> None:
    study = optuna.create_study()
    one, two = Worker(study), Worker(study)
    with one:
        assert not two.is_dead(one.name)
    assert two.is_dead(one.name)

    def live(pipe: Connection) -> None:
        with Worker(optuna.create_study()) as worker:
            pipe.send(worker.name)
            time.sleep(60)

    ours, theirs = FORK.Pipe()
    child = FORK.Process(target=live, args=(theirs,))
    child.start()
    name = ours.recv()
    assert not two.is_dead(name)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    child.join()
    assert two.is_dead(name)
    (Path(tempfile.gettempdir()) / f"dop-search-worker-{name.split(':')[2]}").unlink()


def test_containers_with_one_hostname_do_not_take_each_other_for_dead(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other's process number is nobody's here, or this very process's."""
    child = FORK.Process(target=lambda: None)
    child.start()
    child.join()
    for number in (child.pid, os.getpid()):
        study = optuna.create_study()
        near = Worker(study, grace_s=0.2)
        monkeypatch.setattr(os, "getpid", lambda number=number: number)
        monkeypatch.setattr(tempfile, "tempdir", "/no/such/folder")
        far = Worker(study, heartbeat_s=0.02)
        assert far.name != near.name
        with far:
            monkeypatch.undo()
            until = time.monotonic() + 0.5
            while time.monotonic() < until:
                assert not near.is_dead(far.name)
                time.sleep(0.02)


def test_once_is_done_by_one_and_again_after_an_error() -> None:
    storage = optuna.storages.InMemoryStorage()
    done: list[int] = []
    with Claims(storage, "x") as claims:
        with pytest.raises(ZeroDivisionError):
            claims.once("start", lambda: bool(done), lambda: done.append(1 // 0))
        for _ in range(2):
            claims.once("start", lambda: bool(done), lambda: done.append(1))
    assert done == [1]


# -- the store ------------------------------------------------------------------------------------

SPACE = make_space("dop", 4, 12)
STRATEGIES = [SPACE.strategy({"attention_depth": a, "num_visual_tokens": n}) for a in range(5) for n in (3, 7, 12)]
EXACT = interacting_evaluator(SPACE, 6)


def test_parts_of_the_samples_add_up_and_another_search_is_refused(tmp_path: Path) -> None:
    where = tmp_path / "shared.journal"
    first = SharedEvaluationStore(EXACT, 6, where, "study", {"data": 1})
    np.testing.assert_array_equal(first.evaluate(STRATEGIES[:1], [4, 1]), EXACT(STRATEGIES[:1], [4, 1]))
    second = SharedEvaluationStore(EXACT, 6, where, "study", {"data": 1})
    np.testing.assert_array_equal(second.evaluate(STRATEGIES), EXACT(STRATEGIES, None))
    assert first.num_new_runs == 1
    distinct = len({strategy.key() for strategy in STRATEGIES})
    assert second.num_validation_runs == distinct
    assert second._num_new_samples == 6 * distinct - 2
    with pytest.raises(CacheError, match="belongs to another search"):
        SharedEvaluationStore(EXACT, 6, where, "study", {"data": 2})


def test_a_failing_evaluation_is_given_up(tmp_path: Path) -> None:
    def broken(strategies: Sequence[Strategy], samples: object) -> np.ndarray:
        return np.full((len(strategies), 6), np.nan)

    where = tmp_path / "shared.journal"
    with pytest.raises(NumericalError, match="is nan"):
        SharedEvaluationStore(broken, 6, where, "study").evaluate(STRATEGIES[:2])
    good = SharedEvaluationStore(EXACT, 6, where, "study")
    np.testing.assert_array_equal(good.evaluate(STRATEGIES[:2]), EXACT(STRATEGIES[:2], None))


def test_a_line_torn_while_others_work_is_cut_off(tmp_path: Path) -> None:
    where = tmp_path / "shared.journal"
    one = SharedEvaluationStore(EXACT, 6, where, "study")
    one.evaluate(STRATEGIES[:3])
    journal = tmp_path / "shared.bookkeeping.journal"
    with open(journal, "ab") as file:
        file.write(b'{"op_code":4,"study_id":0,"user_at')
    values = one.evaluate(STRATEGIES)
    two = SharedEvaluationStore(EXACT, 6, where, "study")
    np.testing.assert_array_equal(two.evaluate(STRATEGIES), values)
    assert two.num_new_runs == 0
    assert all(json.loads(line) for line in journal.read_text().splitlines())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("postgresql+psycopg://nobody@/x?host=/no/such/folder", "cannot be opened.*check the address"),
        ("postgresql+nodriver://x/y", "cannot be opened.*"),
        ("mysql+mysqldb://x/y", "cannot be opened.*install its driver"),
    ],
)
def test_a_storage_that_cannot_be_opened_is_named(url: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        open_storage(url)
