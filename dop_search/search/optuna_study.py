"""Optuna plumbing: samplers and pruners by name, storages that survive a crash, parameters of a space."""

from __future__ import annotations

import fcntl
import json
import os
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import sqlalchemy
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState, create_trial

from dop_search.search.sharing import Pause, Worker, end_trial
from dop_search.search.space import Assignment, Parameter, Space
from dop_search.utils.errors import CacheError, ConfigError
from dop_search.utils.registry import Registry

_SAMPLERS: Mapping[str, Callable[[int], optuna.samplers.BaseSampler]] = {
    "tpe": lambda seed: optuna.samplers.TPESampler(seed=seed),
    "gp": lambda seed: optuna.samplers.GPSampler(seed=seed, deterministic_objective=True),
    "cmaes": lambda seed: optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False),
    "nsga2": lambda seed: optuna.samplers.NSGAIISampler(seed=seed, population_size=20),
    "random": lambda seed: optuna.samplers.RandomSampler(seed=seed),
}
_PRUNERS: Mapping[str, Callable[[], optuna.pruners.BasePruner]] = {
    "wilcoxon": lambda: optuna.pruners.WilcoxonPruner(p_threshold=0.1),
    "median": lambda: optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=1),
    "none": lambda: optuna.pruners.NopPruner(),
}
SAMPLERS, PRUNERS = Registry("sampler", _SAMPLERS), Registry("pruner", _PRUNERS)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def make_sampler(name: str, *seed: int) -> optuna.samplers.BaseSampler:
    """A sampler by name (ConfigError if there is none), its random numbers given by all of ``seed``."""
    with _quiet():
        return SAMPLERS.find(name)(int(np.random.SeedSequence(seed).generate_state(1)[0]))


def uses_constraints(sampler: str) -> bool:
    """Whether the sampler understands constraints; for the others they are a penalty in the objective."""
    return sampler != "cmaes"


# -- storages -----------------------------------------------------------------------------------


class _FileLock(JournalFileOpenLock):  # type: ignore[misc, unused-ignore]
    """A lock that the operating system releases when its process dies, so that a crash blocks nobody.

    Whoever gets it cuts off a last line that a crash has torn, so that nothing is written after it.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock_path = path.with_name(path.name + ".flock")
        self._held = ExitStack()

    def acquire(self) -> bool:
        file = open(self._lock_path, "ab")  # noqa: SIM115 (held until release)
        fcntl.flock(file, fcntl.LOCK_EX)
        self._held.callback(file.close)
        with open(self._path, "a+b") as journal:
            if journal.tell() and os.pread(journal.fileno(), 1, journal.tell() - 1) != b"\n":
                journal.seek(0)
                journal.truncate(journal.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        self._held.close()


def open_storage(location: str | Path | None, bookkeeping: bool = False) -> BaseStorage:
    """``None``: in memory; a URL (``sqlite:///…``, ``postgresql+psycopg://…``): a database; a path: a journal file.

    Processes can share a journal file on one machine or over NFS, and a database server from anywhere. ``bookkeeping``:
    what holds who does what, and evaluations, apart from the studies that a person looks at: beside a journal file
    another one; a database has everything, under names that begin with ``bookkeeping/``.

    Raises:
        ConfigError: if the database cannot be reached, or its driver is not installed.
    """
    if location is None:
        return optuna.storages.InMemoryStorage()
    if "://" in str(location):
        return _open_database(str(location))
    path = Path(location)
    if bookkeeping:
        path = path.with_name(f"{path.stem}.bookkeeping{path.suffix}")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _FileLock(path)
    lock.acquire()
    lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def _open_database(url: str, num_tries: int = 10) -> BaseStorage:
    """Optuna's tables are created on first use; another process may be doing just that, so it is tried again."""
    for left in reversed(range(num_tries)):
        try:
            return optuna.storages.get_storage(RDBStorage(url))  # with its cache of finished trials
        except (sqlalchemy.exc.ProgrammingError, sqlalchemy.exc.IntegrityError) as error:
            if not left:
                raise _unusable(url, error) from error
            time.sleep(0.2)
        except (ImportError, sqlalchemy.exc.SQLAlchemyError) as error:
            raise _unusable(url, error) from error
    raise AssertionError("the last try returns or raises")


def _unusable(url: str, error: Exception) -> ConfigError:
    remedy = "check the address and that the server runs"
    if isinstance(error.__cause__ or error, ImportError):
        remedy = "install its driver; for PostgreSQL: pip install 'dop-search[postgres]', and postgresql+psycopg://…"
    reason = str(error.__cause__ or error).splitlines()[0]
    return ConfigError(f"the storage {url!r} cannot be opened ({reason}); {remedy}")


def open_study(
    storage: BaseStorage, name: str, pruner: str, facts: Mapping[str, Any], location: str | Path | None
) -> optuna.Study:
    """Create a study, or continue it: CacheError if its numbers depend on other ``facts``."""
    facts = json.loads(json.dumps(facts))  # as a storage gives them back
    with _quiet():
        made = PRUNERS.find(pruner)()  # over chunks of validation samples
    study = optuna.create_study(storage=storage, study_name=name, pruner=made, load_if_exists=True)
    known = study.user_attrs
    begun = bool(study.get_trials(deepcopy=False))  # a study without trials may still be receiving its facts
    other = {
        key: (known.get(key), value)
        for key, value in facts.items()
        if (key in known or begun) and known.get(key) != value
    }
    if other:
        listed = ", ".join(f"{key}: stored {a!r}, now {b!r}" for key, (a, b) in other.items())
        raise CacheError(
            f"study {name!r} in {str(location)!r} belongs to another search ({listed}); "
            "give another `study_name`, or delete it"
        )
    for key, value in facts.items():
        if key not in known:
            study.set_user_attr(key, value)
    return study


def copy_studies(studies: Sequence[tuple[str, str]], path: Path) -> None:
    """Write studies, given by storage and name, to a journal file of their own, which is replaced."""
    path.unlink(missing_ok=True)
    with quiet_optuna():
        there = open_storage(path)
        for location, name in dict.fromkeys(studies):
            optuna.copy_study(from_study_name=name, from_storage=open_storage(location), to_storage=there)


# -- trials -------------------------------------------------------------------------------------


def place(trial: FrozenTrial) -> int:
    """Which of the study's trials it is: its number, but that a trial is begun again in the place of a lost one."""
    return int(trial.user_attrs.get("place", trial.number))


def finished(study: optuna.Study) -> dict[int, FrozenTrial]:
    """Finished trials by place, in order."""
    return dict(sorted((place(trial), trial) for trial in study.get_trials(deepcopy=False, states=FINISHED)))


def run_trials(
    study: optuna.Study,
    storage: BaseStorage,
    worker: Worker,
    num_trials: int,
    draw: Callable[[int], optuna.samplers.BaseSampler],
    starts: Sequence[Mapping[str, Any]],
    objective: Callable[[Trial], float],
    notify: Callable[[int], None],
) -> None:
    """Run trials, in turn with other processes, until the study has finished so many.

    ``draw`` makes the sampler of a place; ``starts`` are the parameters of the first places, the warm start; ``notify``
    is told how many trials are finished.
    """
    pause = Pause()
    while (num_done := len(finished(study))) < num_trials:
        notify(num_done)
        number = _free_place(study, worker, num_trials)
        if number is None:
            pause()  # others are at the last ones
            continue
        pause = Pause()
        start = starts[number] if number < len(starts) else None
        trial = _begin(study, storage, draw(number), worker, number, start)
        if trial is not None:
            _run(trial, objective)
    notify(num_trials)


def _free_place(study: optuna.Study, worker: Worker, num_trials: int) -> int | None:
    """The first place that nobody has finished or is at, ``None`` without one; trials of dead workers are given up."""
    held = set(finished(study))
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        process = trial.user_attrs.get("process", f"unknown, of trial {trial.number}")
        if not (worker.is_dead(process) and end_trial(study, trial.number)):
            held.add(place(trial))
    return next((number for number in range(num_trials) if number not in held), None)


def _begin(
    study: optuna.Study,
    storage: BaseStorage,
    sampler: optuna.samplers.BaseSampler,
    worker: Worker,
    number: int,
    start: Mapping[str, Any] | None,
) -> Trial | None:
    """A trial in a place; ``None`` if another process has begun it just before.

    It is there with all that tells whose it is, or not at all, so that one whose process is killed can be done again.
    What a lost one had chosen by then is kept.
    """
    trials = study.get_trials(deepcopy=False)
    given = dict(start or {})
    for trial in trials:
        if trial.state == TrialState.FAIL and place(trial) == number:
            given |= trial.params
    facts = {"process": worker.name, "place": number} | ({} if start is None else {"warm_start": True})
    new = create_trial(state=TrialState.RUNNING, user_attrs=facts, system_attrs={"fixed_params": given})
    identifier = storage.create_new_trial(storage.get_study_id_from_name(study.study_name), new)
    fresh = optuna.load_study(study_name=study.study_name, storage=storage, sampler=sampler, pruner=study.pruner)
    mine = Trial(fresh, identifier)
    others = (trial for trial in fresh.get_trials(deepcopy=False) if trial.state != TrialState.FAIL)
    if any(place(trial) == number and trial.number < mine.number for trial in others):
        end_trial(study, mine.number)
        return None
    return mine


def _run(trial: Trial, objective: Callable[[Trial], float]) -> None:
    """Let a trial choose and be judged; one that raises an error stays open, to be retried."""
    try:
        value = objective(trial)
    except optuna.TrialPruned:
        trial.study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    except UpdateFinishedTrialError:
        return  # this process was silent for so long that others have given the trial up
    else:
        trial.study.tell(trial, value, skip_if_finished=True)


# -- parameters ---------------------------------------------------------------------------------


def suggest(trial: Trial, space: Space) -> dict[str, int]:
    """Let a trial choose: exit depths as depth ratios, visual tokens as a number (on a log scale)."""
    values: dict[str, int] = {}
    for parameter in space.parameters:
        low, high = parameter.levels[0], parameter.full
        if low == high:
            values[parameter.name] = high
        elif parameter.role == "tokens":
            chosen: float = trial.suggest_int(parameter.name, low, high, log=low >= 1)
            values[parameter.name] = parameter.nearest(chosen)
        else:
            ratio = trial.suggest_float(_ratio_name(parameter), low / space.num_layers, 1.0)
            values[parameter.name] = parameter.nearest(ratio * space.num_layers)
    return values


def trial_parameters(space: Space, assignment: Assignment) -> dict[str, float]:
    """The inverse of :func:`suggest`, for ``enqueue_trial``."""
    return {
        p.name if p.role == "tokens" else _ratio_name(p): (
            assignment[p.name] if p.role == "tokens" else assignment[p.name] / space.num_layers
        )
        for p in space.parameters
        if len(p.levels) > 1
    }


def _ratio_name(parameter: Parameter) -> str:
    return f"{parameter.name}_ratio"


# -- small things -------------------------------------------------------------------------------


@contextmanager
def quiet_optuna() -> Iterator[None]:
    """Keep Optuna's log lines to warnings inside; progress goes through ``on_progress``."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(before)


@contextmanager
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
