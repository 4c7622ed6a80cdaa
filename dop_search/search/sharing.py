"""How processes that share an Optuna storage agree on who does what, and notice when one of them dies.

Everything goes through the storage: a file on one machine or NFS, or a database. No clocks are compared.
"""

from __future__ import annotations

import os
import socket
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from dop_search.utils.processes import hold, is_abandoned

HEARTBEAT_S = 10.0
"""How often a worker says that it is alive."""
GRACE_S = 60.0
"""How long a worker may be silent, of which nothing else is known, before its work is given to others."""

BOOKKEEPING = "bookkeeping/"
"""How names of studies begin that hold no search of a person's."""


class Worker:
    """This process among those that share a study; while entered, it counts up an attribute of the study.

    Its name is its own: host and process number are there for the reader, the rest is random. On this machine it holds
    a file of that name, by which others that see the file know at once when its process has ended. It counts every
    ``heartbeat_s``; without a new count for ``grace_s`` it is taken for dead.
    """

    def __init__(self, study: optuna.Study, heartbeat_s: float = HEARTBEAT_S, grace_s: float = GRACE_S) -> None:
        self.name = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex[:16]}"
        self._study, self._heartbeat_s, self._grace_s = study, heartbeat_s, grace_s
        self._count = 0  # never starts again: others tell by it that time has passed
        self._seen: dict[str, tuple[object, float]] = {}
        self._stop = threading.Event()
        self._running = ExitStack()

    def __enter__(self) -> Worker:
        self._stop.clear()
        sign = _sign_of_life(self.name)
        with suppress(OSError):  # no folder for it: the heartbeat alone, then
            self._running.callback(sign.unlink, missing_ok=True)
            self._running.enter_context(hold(sign))
        self._beat()
        thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)
        thread.start()
        self._running.callback(thread.join)
        self._running.callback(self._stop.set)
        return self

    def __exit__(self, *error: object) -> None:
        self._running.close()
        self._study.set_user_attr(_alive(self.name), None)

    def _beat(self) -> None:
        self._count += 1
        self._study.set_user_attr(_alive(self.name), self._count)

    def _beat_on(self) -> None:
        while not self._stop.wait(self._heartbeat_s):
            self._beat()

    def is_dead(self, name: str) -> bool:
        """Whether a worker has stopped, has left its file on this machine, or was silent for too long."""
        if name == self.name:
            return False
        if is_abandoned(_sign_of_life(name)):
            return True
        attributes = self._study.user_attrs
        beat = attributes.get(_alive(name))
        if _alive(name) in attributes and beat is None:
            return True
        known, since = self._seen.get(name, (None, 0.0))
        if name not in self._seen or known != beat:
            self._seen[name] = (beat, time.monotonic())
            return False
        return time.monotonic() - since > self._grace_s


class Claims:
    """Things that are to be done once, claimed by one process at a time.

    A claim is a running trial that lists what is claimed; of two that list the same thing the one with the lower number
    holds. The storage numbers trials one after the other, so that all processes agree. Enter it to claim.
    """

    def __init__(
        self, storage: BaseStorage, name: str, heartbeat_s: float = HEARTBEAT_S, grace_s: float = GRACE_S
    ) -> None:
        name = f"{BOOKKEEPING}claims/{name.removeprefix(BOOKKEEPING)}"
        self._study = optuna.create_study(storage=storage, study_name=name, load_if_exists=True)
        self.worker = Worker(self._study, heartbeat_s, grace_s)

    def __enter__(self) -> Claims:
        self.worker.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.worker.__exit__(*error)

    def taken(self) -> set[str]:
        """What living workers hold; the claims of dead ones are given up."""
        things: set[str] = set()
        for trial in self._live():
            if self.worker.is_dead(trial.user_attrs["worker"]):
                end_trial(self._study, trial.number)
            else:
                things.update(trial.user_attrs["things"])
        return things

    @contextmanager
    def claim(self, things: Sequence[str]) -> Iterator[list[str]]:
        """Hold those of ``things`` that no earlier claim holds; given up when the context ends, also by an error."""
        claim = {"claim": uuid.uuid4().hex, "worker": self.worker.name, "things": list(things)}
        self._study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs=claim))
        live = self._live()
        place = next(i for i, trial in enumerate(live) if trial.user_attrs["claim"] == claim["claim"])
        taken = {thing for trial in live[:place] for thing in trial.user_attrs["things"]}
        mine = [thing for thing in things if thing not in taken]
        num_done = None
        try:
            yield mine
            num_done = len(mine) or None
        finally:
            end_trial(self._study, live[place].number, num_done)

    def once(self, thing: str, is_done: Callable[[], bool], do: Callable[[], None]) -> None:
        """Let one process ``do`` something; returns when it is done, by whomever."""
        pause = Pause()
        while not is_done():
            if thing in self.taken():
                pause()
                continue
            with self.claim([thing]) as mine:
                if mine and not is_done():
                    do()

    def _live(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))


class Pause:
    """Sleeps, each time a little longer, from 20 ms up to two seconds."""

    _next_s = 0.02

    def __call__(self) -> None:
        """Sleep once."""
        time.sleep(self._next_s)
        self._next_s = min(1.5 * self._next_s, 2.0)


def end_trial(study: optuna.Study, number: int, value: float | None = None) -> bool:
    """End a running trial, without a value as failed. Of several processes that try, one does and is told ``True``."""
    try:
        study.tell(number, value, state=TrialState.FAIL if value is None else None)
    except (ValueError, UpdateFinishedTrialError):  # it has ended meanwhile
        return False
    return True


def _alive(worker: str) -> str:
    return f"alive {worker}"


def _sign_of_life(worker: str) -> Path:
    return Path(tempfile.gettempdir()) / f"dop-search-worker-{worker.rpartition(':')[2]}"
