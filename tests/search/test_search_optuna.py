"""Optuna solvers: feasible, warm-started, resumable, shared by workers."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import optuna
import pytest
from invented_problems import counted, interacting_evaluator, pocket_problem
from optuna.storages.journal import JournalFileBackend

from dop_search.search import EvaluationStore, MeasuredSolution, Problem, solve, uniform_assignment
from dop_search.search.optuna_study import FINISHED, open_storage, suggest, trial_parameters
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import CacheError, ConfigError

BUDGET = Budget(flops_ratio=0.35)


def with_store(problem: Problem, num_samples: int = 20, path: Path | None = None) -> tuple[Problem, list[int]]:
    evaluator, calls = counted(interacting_evaluator(problem.space, num_samples))
    return replace(problem, store=EvaluationStore(evaluator, num_samples, path)), calls


@pytest.mark.parametrize("kind", ["dop", "dop_split", "dop_groups", "uniform"])
def test_trial_parameters_are_the_inverse_of_suggest(kind: str) -> None:
    space = pocket_problem(kind).space
    rng = np.random.default_rng(0)
    for _ in range(20):
        assignment = {p.name: int(rng.choice(p.levels)) for p in space.parameters}
        parameters = trial_parameters(space, assignment)
        assert suggest(optuna.trial.FixedTrial(parameters), space) == assignment  # type: ignore[arg-type]
        assert all(0 <= v <= 1 for name, v in parameters.items() if name.endswith("_ratio"))


@pytest.mark.parametrize(
    ("sampler", "num_trials"), [("tpe", 60), ("gp", 12), ("cmaes", 100), ("nsga2", 100), ("random", 100)]
)
@pytest.mark.fast_cases(1)
def test_every_sampler_solves_the_surrogate_within_the_budget(sampler: str, num_trials: int) -> None:
    problem = pocket_problem("dop_split")
    optimum = solve("additive_exact", problem, BUDGET)
    found = solve("additive_optuna", problem, BUDGET, sampler=sampler, num_trials=num_trials)
    assert problem.surrogate is not None
    assert found.kl_additive == problem.surrogate(found.assignment)
    assert problem.cost_model.ratio(found.strategy) == found.cost_ratio <= 0.35
    assert optimum.kl_additive is not None
    assert found.kl_additive is not None
    assert optimum.kl_additive <= found.kl_additive + 1e-12
    assert len(found.history) == num_trials
    if sampler != "gp":  # too slow to do twice
        again = solve("additive_optuna", problem, BUDGET, sampler=sampler, num_trials=num_trials)
        assert again.history == found.history  # same seed


@pytest.mark.parametrize(
    ("sampler", "num_trials"), [("tpe", 30), ("gp", 13), ("cmaes", 30), ("nsga2", 30), ("random", 30)]
)
def test_exact_optuna_is_at_least_as_good_as_its_warm_start(sampler: str, num_trials: int) -> None:
    problem, calls = with_store(pocket_problem("dop_split"))
    found = solve("exact_optuna", problem, BUDGET, sampler=sampler, num_trials=num_trials, num_warm_start=6)
    exact = interacting_evaluator(problem.space, 20)
    np.testing.assert_array_equal(found.per_sample_nats, exact([found.strategy], None)[0])
    uniform = uniform_assignment(problem, BUDGET)
    assert uniform is not None
    for strategy in (solve("additive_exact", problem, BUDGET).strategy, problem.space.strategy(uniform)):
        assert found.kl_search is not None
        assert found.kl_search <= exact([strategy], None).mean() + 1e-15
    assert len(found.history) == num_trials
    assert found.history[0]["assignment"] == dict(solve("additive_exact", problem, BUDGET).assignment)
    assert all("num_samples" not in record for record in found.history if not record["fits"])
    assert found.num_validation_runs == -(-sum(calls) // 20)  # nothing above the budget, nothing twice


def test_the_pruner_saves_runs_and_keeps_the_answer() -> None:
    problem = pocket_problem("dop_split", num_samples=64)
    options = {"sampler": "random", "num_trials": 50, "num_warm_start": 4, "seed": 1}
    whole, _ = with_store(problem, 64)
    everything = solve("exact_optuna", whole, BUDGET, pruner="none", **options)
    for pruner in ("wilcoxon", "median"):
        pruned, calls = with_store(problem, 64)
        found = solve("exact_optuna", pruned, BUDGET, pruner=pruner, **options)
        assert sum(record["state"] == "PRUNED" for record in found.history) > 3
        assert found.num_validation_runs < everything.num_validation_runs
        assert found.num_validation_runs == -(-sum(calls) // 64)
        assert found.kl_search == pytest.approx(everything.kl_search, rel=0.05)


def test_unknown_names_are_refused() -> None:
    problem, _ = with_store(pocket_problem("dop", num_tokens=6))
    with pytest.raises(ConfigError, match="unknown sampler 'tpee'; did you mean 'tpe'"):
        solve("additive_optuna", problem, BUDGET, sampler="tpee", num_trials=3)
    with pytest.raises(ConfigError, match="unknown pruner 'wilcoxn'; did you mean 'wilcoxon'"):
        solve("exact_optuna", problem, BUDGET, pruner="wilcoxn", num_trials=3)
    with pytest.raises(ConfigError, match="num_chunks=0"):
        solve("exact_optuna", problem, BUDGET, num_chunks=0)


# -- storages -----------------------------------------------------------------------------------


def locations(folder: Path) -> dict[str, str]:
    return {"journal": str(folder / "study.journal"), "sqlite": f"sqlite:///{folder}/study.db"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal", "sqlite"])
def test_a_study_is_continued_as_if_it_had_never_stopped(tmp_path: Path, kind: str) -> None:
    where = locations(tmp_path)[kind]
    options = {"num_warm_start": 3, "seed": 5, "study_name": "a"}
    some, all_of_them = (8, 16) if kind == "journal" else (3, 6)
    problem, calls = with_store(pocket_problem("dop", num_tokens=12), path=tmp_path / "kl.jsonl")
    solve("exact_optuna", problem, BUDGET, num_trials=some, storage=where, **options)
    first = sum(calls)
    problem, calls = with_store(problem, path=tmp_path / "kl.jsonl")
    resumed = solve("exact_optuna", problem, BUDGET, num_trials=all_of_them, storage=where, **options)
    again, more = with_store(problem, path=tmp_path / "kl.jsonl")
    finished = solve("exact_optuna", again, BUDGET, num_trials=all_of_them, storage=where, **options)
    straight, all_calls = with_store(problem)
    reference = solve("exact_optuna", straight, BUDGET, num_trials=all_of_them, **options)

    assert more == []  # all trials are finished: nothing to do
    assert first + sum(calls) == sum(all_calls)
    assert list(resumed.history) == list(reference.history) == list(finished.history)
    assert resumed.num_validation_runs == reference.num_validation_runs
    stores = [item.need_store("exact_optuna") for item in (problem, again, straight)]
    assert len({store.num_validation_runs for store in stores}) == 1, "what the whole search counts is the same, too"
    assert resumed.strategy == reference.strategy


def test_another_search_under_the_same_name_is_refused(tmp_path: Path) -> None:
    where = str(tmp_path / "study.journal")
    problem, _ = with_store(pocket_problem("dop", num_tokens=6))
    solve("exact_optuna", problem, BUDGET, num_trials=2, storage=where)
    with pytest.raises(CacheError, match=r"belongs to another search .*budget"):
        solve("exact_optuna", problem, Budget(flops_ratio=0.5), num_trials=2, storage=where)
    solve("exact_optuna", problem, Budget(flops_ratio=0.5), num_trials=2, storage=where, study_name="other")


def test_other_shares_seeds_or_samples_are_another_search(tmp_path: Path) -> None:
    def search(problem: Problem, **options: int) -> None:
        solve("exact_optuna", problem, BUDGET, num_trials=4, num_warm_start=1, storage=where, study_name="a", **options)

    where = str(tmp_path / "study.journal")
    problem, _ = with_store(pocket_problem("dop_groups"))
    search(problem)
    with pytest.raises(CacheError, match=r"shares: stored \[.*now \[0.75, 0.25\]"):
        search(replace(problem, space=replace(problem.space, shares=(0.75, 0.25))))
    with pytest.raises(CacheError, match="seed: stored 0, now 1"):
        search(problem, seed=1)
    store = EvaluationStore(interacting_evaluator(problem.space, 20), 20, None, {"averaging": "per_token"})
    with pytest.raises(CacheError, match="per_token"):
        search(replace(problem, store=store))


def test_a_journal_torn_by_a_crash_is_continued(tmp_path: Path) -> None:
    where = tmp_path / "study.journal"
    problem, _ = with_store(pocket_problem("dop", num_tokens=6))
    solve("exact_optuna", problem, BUDGET, num_trials=4, storage=where)
    with open(where, "ab") as file:
        file.write(b'{"op_code":5,"wor')
    found = solve("exact_optuna", problem, BUDGET, num_trials=6, storage=where)
    assert len(found.history) == 6
    assert len(finished(tmp_path)) == 6


def slow_worker(folder: str, delay: float, num_trials: int) -> None:
    base = pocket_problem("dop", num_tokens=12)
    exact = interacting_evaluator(base.space, 20)

    def evaluator(strategies: Sequence[Strategy], samples: Sequence[int] | None) -> np.ndarray:
        time.sleep(delay)
        return exact(strategies, samples)

    problem = replace(base, store=EvaluationStore(evaluator, 20, Path(folder) / "kl.jsonl"))
    options = {"pruner": "none", "num_warm_start": 3, "num_trials": num_trials}
    solve("exact_optuna", problem, BUDGET, storage=Path(folder) / "study.journal", **options)


def finished(folder: Path) -> list[optuna.trial.FrozenTrial]:
    if not (folder / "study.journal").exists():
        return []
    try:
        study = optuna.load_study(study_name="dop_search", storage=open_storage(folder / "study.journal"))
    except KeyError:
        return []
    return study.get_trials(states=FINISHED)


def evaluated(folder: Path) -> list[str]:
    """The strategies in the file of evaluations, in order."""
    return [line.split('"samples"')[0] for line in (folder / "kl.jsonl").read_text().splitlines()[1:]]


def killed_worker(folder: Path, num_writes: int) -> None:
    """A search that is killed when it writes to the study for the n-th time: before it does."""
    count = itertools.count()
    append = JournalFileBackend.append_logs

    def counted_append(self: JournalFileBackend, logs: list[dict[str, object]]) -> None:
        if "bookkeeping" not in self._file_path and next(count) == num_writes:
            os.kill(os.getpid(), signal.SIGKILL)
        append(self, logs)

    JournalFileBackend.append_logs = counted_append
    search_to_the_end(folder)


def search_to_the_end(folder: Path) -> MeasuredSolution:
    problem, _ = with_store(pocket_problem("dop", num_tokens=12), path=folder / "kl.jsonl")
    options = {"num_trials": 7, "num_warm_start": 2, "num_chunks": 3}
    return solve("exact_optuna", problem, BUDGET, storage=folder / "study.journal", **options)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_search_that_is_killed_at_any_write_ends_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    reference = search_to_the_end(tmp_path / "straight")
    num_writes = len((tmp_path / "straight" / "study.journal").read_text().splitlines())
    assert num_writes > 40
    context = multiprocessing.get_context("fork")
    for number in [*range(18, 32, 3), num_writes - 2]:  # of warm starts and drawn trials, different writes
        folder = tmp_path / str(number)
        for further in (number, 1):
            victim = context.Process(target=killed_worker, args=(folder, further))
            victim.start()
            victim.join()
            assert victim.exitcode == -signal.SIGKILL
        start = time.monotonic()
        found = search_to_the_end(folder)
        assert time.monotonic() - start < 10, "the dead process was noticed at once"
        assert list(found.history) == list(reference.history)
        assert found.num_validation_runs == reference.num_validation_runs


def test_more_candidates_to_begin_with_than_trials_are_said_to_be(caplog: pytest.LogCaptureFixture) -> None:
    problem, _ = with_store(pocket_problem("dop", num_tokens=12))
    found = solve("exact_optuna", problem, BUDGET, num_trials=3, num_warm_start=8)
    assert len(found.history) == 3
    assert "num_trials=3 are all taken by the 8 candidates" in caplog.text
    caplog.clear()
    solve("exact_optuna", problem, BUDGET, num_trials=10, num_warm_start=8)
    assert caplog.text == ""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_workers_share_a_study_and_a_killed_one_loses_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=slow_worker, args=(str(tmp_path), 0.4, 14)) for _ in range(2)]
    for worker in workers:
        worker.start()
    deadline = time.monotonic() + 60
    while len(finished(tmp_path)) < 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    for worker in workers:
        assert worker.pid is not None
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    before = {trial.number: trial.value for trial in finished(tmp_path)}
    assert len(before) >= 4
    known = evaluated(tmp_path)
    slow_worker(str(tmp_path), 0.0, 14)

    trials = finished(tmp_path)
    assert len(trials) == 14
    after = {trial.number: trial.value for trial in trials}
    assert {number: after[number] for number in before} == before
    study = optuna.load_study(study_name="dop_search", storage=open_storage(tmp_path / "study.journal"))
    assert not study.get_trials(states=(optuna.trial.TrialState.RUNNING, optuna.trial.TrialState.WAITING))
    lost = study.get_trials(states=(optuna.trial.TrialState.FAIL,))
    for trial in lost:  # what was lost was done again, whether all of its parameters were drawn by then or not
        assert any(trial.params.items() <= other.params.items() for other in trials)
    assert not set(evaluated(tmp_path)[len(known) :]) & set(known)  # what is finished is not repeated
