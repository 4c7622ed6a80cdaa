"""Evaluations shared by several processes through an Optuna storage: each is done by one of them, all read it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from optuna.trial import create_trial

from dop_search.search.optuna_study import open_storage, open_study, quiet_optuna
from dop_search.search.sharing import BOOKKEEPING, GRACE_S, HEARTBEAT_S, Claims, Pause
from dop_search.search.store import EvaluationStore, Evaluator, Report
from dop_search.strategy import Strategy

CHUNK_SIZE = 4
"""Strategies that a worker claims at once: few enough to share the work, enough to share prefixes."""


class SharedEvaluationStore(EvaluationStore):
    """An :class:`EvaluationStore` in an Optuna study: every evaluated strategy is a finished trial.

    Processes that run the same search ask for the same strategies in the same order. Each claims a few of them at a
    time, evaluates them, and reads what the others have evaluated. What a dead process had claimed is claimed again; it
    loses at most that. Strategies are evaluated in the same company whoever does it, so the numbers do not depend on
    how many processes take part, as long as they compute on the same kind of device.

    Beside the base's arguments ``location`` is that of the storage, a journal file or a database URL, ``name`` that of
    the study, the same for all processes; ``heartbeat_s``, ``grace_s``: see :class:`Worker`.

    Raises:
        CacheError: if the study belongs to another ``header``.
        ConfigError: if the storage cannot be opened.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        num_samples: int,
        location: str | Path,
        name: str,
        header: Mapping[str, Any] | None = None,
        batch_size: int = CHUNK_SIZE,
        heartbeat_s: float = HEARTBEAT_S,
        grace_s: float = GRACE_S,
    ) -> None:
        super().__init__(evaluator, num_samples, None, header, batch_size)
        with quiet_optuna():
            storage = open_storage(location, bookkeeping=True)
            self._study = open_study(storage, BOOKKEEPING + name, "none", self._header, location)
            self._claims = Claims(storage, name, heartbeat_s, grace_s)
        self._num_read = 0

    def _fill(self, distinct: Mapping[str, Strategy], samples: NDArray[Any], everything: bool, report: Report) -> None:
        if not self._missing(distinct, samples):
            return report(0)
        # What this process has not asked for yet: the same in every process, whatever others have evaluated meanwhile.
        new = [key for key in distinct if not self._was_requested(key, samples)]
        size = max(1, min(self.batch_size, len(new) // 8))
        chunks = [new[start : start + size] for start in range(0, len(new), size)]
        pause = Pause()
        with self._claims as claims:
            while True:
                self._refresh()
                missing = set(self._missing(distinct, samples))
                report(len(missing))
                if not missing:
                    return None
                wanted = missing - claims.taken()
                chunk = next((chunk for chunk in chunks if wanted.intersection(chunk)), None)
                if chunk is None:
                    pause()
                    continue
                pause = Pause()
                with claims.claim([key for key in chunk if key in wanted]) as mine:
                    self._refresh()  # some may have been finished just before the claim
                    mine[:] = self._missing(mine, samples)
                    if mine:
                        self._run(mine, [distinct[key] for key in mine], samples, everything)

    def _refresh(self) -> None:
        trials = self._study.get_trials(deepcopy=False)
        for trial in trials[self._num_read :]:
            self._remember(trial.user_attrs)
        self._num_read = len(trials)

    def _save(self, records: Sequence[Mapping[str, Any]]) -> None:
        for record in records:
            mean = float(np.mean(record["kl_nats"]))
            self._study.add_trial(create_trial(value=mean, user_attrs=dict(record)))
            self._remember(record)
