"""Optuna plumbing: samplers and pruners by name, storages that survive a crash, parameters of a space."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import IO, Any

import numpy as np
import optuna
from optuna.storages import BaseStorage, JournalStorage, RDBStorage, RetryHeartbeatStaleTrialCallback
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial, Trial, TrialState

from dop_search.errors import CacheError, ConfigError
from dop_search.search.space import Assignment, Parameter, Space

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
SAMPLERS = tuple(_SAMPLERS)
PRUNERS = tuple(_PRUNERS)

FINISHED = (TrialState.COMPLETE, TrialState.PRUNED)


def make_sampler(name: str, *seed: int) -> optuna.samplers.BaseSampler:
    """A sampler by name, its random numbers given by all of ``seed``.

    Raises:
        ConfigError: on an unknown name, naming a near one.
    """
    _check(name, SAMPLERS, "sampler")
    with _quiet():
        return _SAMPLERS[name](int(np.random.SeedSequence(seed).generate_state(1)[0]))


def make_pruner(name: str) -> optuna.pruners.BasePruner:
    """A pruner over chunks of validation samples by name.

    Raises:
        ConfigError: on an unknown name, naming a near one.
    """
    _check(name, PRUNERS, "pruner")
    with _quiet():
        return _PRUNERS[name]()


def uses_constraints(sampler: str) -> bool:
    """Whether the sampler understands constraints; for the others they are a penalty in the objective."""
    return sampler != "cmaes"


# -- storages -----------------------------------------------------------------------------------


class _FileLock(JournalFileOpenLock):  # type: ignore[misc, unused-ignore]
    """A lock that the operating system releases when its process dies, so that a crash blocks nobody."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[bytes] | None = None

    def acquire(self) -> bool:
        self._file = open(self._path, "ab")  # noqa: SIM115 (held until release)
        fcntl.flock(self._file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        assert self._file is not None
        self._file.close()
        self._file = None


def open_storage(location: str | Path | None) -> BaseStorage:
    """``None``: in memory; a URL (``sqlite:///…``): a database; a path: a journal file, shared by processes.

    A journal's last line torn by a crash is cut off. Workers in a database send heartbeats, and the trial of
    one that died is retried.
    """
    if location is None:
        return optuna.storages.InMemoryStorage()
    if "://" in str(location):
        with _quiet():
            return RDBStorage(
                str(location),
                heartbeat_interval=60,
                grace_period=180,
                heartbeat_stale_trial_callback=RetryHeartbeatStaleTrialCallback(max_retry=3),
            )
    path = Path(location)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _FileLock(path.with_name(path.name + ".flock"))
    lock.acquire()
    try:
        with open(path, "a+b") as file:
            file.seek(0)
            file.truncate(file.read().rfind(b"\n") + 1)
    finally:
        lock.release()
    return JournalStorage(JournalFileBackend(str(path), lock_obj=lock))


def open_study(
    storage: BaseStorage, name: str, pruner: str, facts: Mapping[str, Any], location: str | Path | None
) -> optuna.Study:
    """Create or continue a study; ``facts`` say what its numbers depend on.

    Raises:
        CacheError: if the study in the storage depends on other facts.
    """
    study = optuna.create_study(storage=storage, study_name=name, pruner=make_pruner(pruner), load_if_exists=True)
    known = study.user_attrs
    other = {key: (known[key], value) for key, value in facts.items() if key in known and known[key] != value}
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


def num_trials(study: optuna.Study, running: bool) -> int:
    """Finished trials, with those that run now if asked for."""
    states = (*FINISHED, TrialState.RUNNING) if running else FINISHED
    return len(study.get_trials(deepcopy=False, states=states))


def this_process() -> str:
    """Who runs a trial: host and process id."""
    return f"{socket.gethostname()}:{os.getpid()}"


def retry_lost_trials(study: optuna.Study) -> int:
    """Fail trials whose process on this host has died and queue their parameters again; how many."""
    lost = [trial for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)) if _is_lost(trial)]
    for trial in lost:
        study.tell(trial.number, state=TrialState.FAIL)
        parameters = {**trial.system_attrs.get("fixed_params", {}), **trial.params}
        if parameters:
            kept = {"warm_start": True} if "warm_start" in trial.user_attrs else None
            study.enqueue_trial(parameters, user_attrs=kept)
    return len(lost)


def _is_lost(trial: FrozenTrial) -> bool:
    host, _, process = str(trial.user_attrs.get("process", "")).rpartition(":")
    if not process:  # killed before it could say who it was
        return True
    if host != socket.gethostname():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return int(process) == os.getpid()  # this process runs one trial at a time, and none while it looks


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


def _check(name: str, known: tuple[str, ...], what: str) -> None:
    if name not in known:
        near = get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"unknown {what} {name!r}; {hint}known: {list(known)}")
