"""Evaluations of strategies, each done once: in memory and, to survive a crash, in a JSON-lines file."""

from __future__ import annotations

import fcntl
import json
import math
import os
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from dop_search.strategy import Strategy
from dop_search.utils.errors import CacheError, ConfigError, DataError, NumericalError
from dop_search.utils.files import cannot_write
from dop_search.utils.versioned import Format

FloatArray: TypeAlias = NDArray[np.float64]
Evaluator: TypeAlias = Callable[[Sequence[Strategy], Sequence[int] | None], FloatArray]
"""Per-sample divergence in nats ``[num_strategies, num_samples]``; second argument: which samples (None: all)."""

OnProgress: TypeAlias = Callable[[int, int | None, str], None]
"""Called with (done, total, what is being measured)."""

Report: TypeAlias = Callable[[int], None]
"""Called with the number of strategies still to be evaluated."""

FORMAT = Format(
    "an evaluation file",
    "dop_search.evaluations",
    1,
    "delete that file, or set another cache_dir, and run again: only what it held is measured anew",
)


class EvaluationStore:
    """Remembers every per-sample divergence, so that no strategy is evaluated twice on a sample.

    Strategies are the same when their :meth:`Strategy.key` is. Results are appended to ``path`` as they come,
    under a lock, so that several processes may share a file. A last line torn by a crash is dropped; each line has a
    checksum (files of older versions have none and are read all the same).

    Args:
        evaluator: computes what is not known yet.
        num_samples: samples of the validation set.
        path: JSON-lines file; ``None`` keeps everything in memory.
        header: what the numbers depend on (model, data, objective); a file with another header is refused.
        batch_size: strategies per call of the evaluator and so per save. Large batches let the evaluator
            share prefixes, small ones save more often.

    Raises:
        CacheError: if the file is not an evaluation file, is corrupt, or belongs to another ``header``.
        WriteError: if it cannot be written.
        DataError: without samples.
    """

    def __init__(
        self,
        evaluator: Evaluator,
        num_samples: int,
        path: str | Path | None = None,
        header: Mapping[str, Any] | None = None,
        batch_size: int = 64,
    ) -> None:
        if num_samples < 1:
            raise DataError("an evaluation store needs at least one validation sample, but got none")
        if batch_size < 1:
            raise ConfigError(f"`batch_size >= 1` must hold, but got (batch_size={batch_size})")
        self.num_samples = num_samples
        self.batch_size = batch_size
        self.path = None if path is None else Path(path)
        self._evaluator = evaluator
        self._header = {**FORMAT.stamp, "num_samples": num_samples, **(header or {})}
        self._header = json.loads(json.dumps(self._header, sort_keys=True))
        self._values: dict[str, FloatArray] = {}  # NaN: not evaluated
        self._requested: dict[str, NDArray[np.bool_]] = {}
        self._num_new_samples = 0
        self._offset = 0
        if self.path is not None:
            self._append(self.path, [])

    @property
    def header(self) -> dict[str, Any]:
        """What the numbers depend on, with the file's format and the number of samples."""
        return dict(self._header)

    # -- counters -------------------------------------------------------------------------------

    @property
    def num_validation_runs(self) -> int:
        """Strategies this search has asked for, new or remembered (a part of the samples counts as a part,
        the sum rounded up); a resumed search ends with the same number as an uninterrupted one."""
        return -(-sum(int(asked.sum()) for asked in self._requested.values()) // self.num_samples)

    @property
    def num_new_runs(self) -> int:
        """Like :attr:`num_validation_runs`, but only what this process had to evaluate."""
        return -(-self._num_new_samples // self.num_samples)

    def __len__(self) -> int:
        return len(self._values)

    # -- evaluation -----------------------------------------------------------------------------

    def evaluate(
        self,
        strategies: Sequence[Strategy],
        sample_indices: Sequence[int] | None = None,
        on_progress: OnProgress | None = None,
        what: str = "evaluating strategies",
    ) -> FloatArray:
        """Per-sample divergence in nats ``[num_strategies, num_samples or len(sample_indices)]``.

        Raises:
            NumericalError: if the evaluator returns NaN or infinity; nothing of that batch is saved.
        """
        samples = np.arange(self.num_samples) if sample_indices is None else np.asarray(sample_indices, dtype=int)
        keys = [strategy.key() for strategy in strategies]
        distinct = dict(zip(keys, strategies, strict=True))

        def report(num_missing: int) -> None:
            if on_progress is not None:
                on_progress(len(distinct) - num_missing, len(distinct), what)

        self._fill(distinct, samples, sample_indices is None, report)
        for strategy in distinct.values():
            self.count(strategy, samples)
        return np.stack([self._values[key][samples] for key in keys]) if keys else np.zeros((0, len(samples)))

    def means(
        self, on_progress: OnProgress | None = None, what: str = "evaluating strategies"
    ) -> Callable[[Sequence[Strategy]], FloatArray]:
        """A function from strategies to their mean divergences in nats, for searches that ask many times: progress
        counts the strategies of all calls."""
        num_done = 0

        def evaluate(strategies: Sequence[Strategy]) -> FloatArray:
            nonlocal num_done
            before = num_done

            def step(done: int, total: int | None, what: str) -> None:
                nonlocal num_done
                num_done = before + done
                if on_progress is not None:
                    on_progress(num_done, None, what)

            return self.evaluate(strategies, on_progress=step, what=what).mean(axis=1)

        return evaluate

    def count(self, strategy: Strategy, samples: NDArray[Any]) -> None:
        """Count a run as asked for, as by :meth:`evaluate`, that a solver's own memory has the result of."""
        self._requested.setdefault(strategy.key(), np.zeros(self.num_samples, dtype=np.bool_))[samples] = True

    def _fill(self, distinct: Mapping[str, Strategy], samples: NDArray[Any], everything: bool, report: Report) -> None:
        """Evaluate what is not known of strategies by key; ``everything``: on all samples."""
        self._refresh()
        missing = self._missing(distinct, samples)
        report(len(missing))
        for start in range(0, len(missing), self.batch_size):
            batch = missing[start : start + self.batch_size]
            still = self._missing(batch, samples)  # another process may have saved some since
            if still:
                self._run(still, [distinct[key] for key in still], samples, everything)
            report(len(missing) - start - len(batch))

    def _missing(self, keys: Iterable[str], samples: NDArray[Any]) -> list[str]:
        return [key for key in keys if np.isnan(self._known(key)[samples]).any()]

    def _known(self, key: str) -> FloatArray:
        return self._values.get(key, np.full(self.num_samples, np.nan))

    def _was_requested(self, key: str, samples: NDArray[Any]) -> bool:
        return key in self._requested and bool(self._requested[key][samples].all())

    def _run(self, keys: list[str], strategies: list[Strategy], samples: NDArray[Any], everything: bool) -> None:
        unknown = [np.isnan(self._known(key)[samples]) for key in keys]
        if everything and all(mask.all() for mask in unknown):
            todo, values = samples, self._evaluator(strategies, None)
        else:
            todo = samples[np.any(unknown, axis=0)]
            values = self._evaluator(strategies, todo.tolist())
        values = np.asarray(values, dtype=np.float64)
        if values.shape != (len(keys), len(todo)):
            raise DataError(
                f"an evaluator must return a number per strategy and sample, {(len(keys), len(todo))}, but got the "
                f"shape {values.shape}"
            )
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            row, column = bad[0]
            raise NumericalError(
                f"the divergence of {strategies[row].describe()!r} on sample {int(todo[column])} is "
                f"{values[row, column]}; evaluate in float32 or bfloat16, or drop the sample"
            )
        self._num_new_samples += values.size
        indices = None if len(todo) == self.num_samples else todo.tolist()
        self._save([{"key": k, "samples": indices, "kl_nats": v.tolist()} for k, v in zip(keys, values, strict=True)])

    def _refresh(self) -> None:
        """Take in what other processes have saved meanwhile."""
        if self.path is not None:
            self._append(self.path, [])

    def _save(self, records: Sequence[Mapping[str, Any]]) -> None:
        if self.path is not None:
            self._append(self.path, records)
        else:
            for record in records:
                self._remember(record)

    def _remember(self, record: Mapping[str, Any]) -> None:
        known = self._values.setdefault(record["key"], np.full(self.num_samples, np.nan))
        known[slice(None) if record["samples"] is None else record["samples"]] = record["kl_nats"]

    # -- the file -------------------------------------------------------------------------------

    def _append(self, path: Path, records: Sequence[Mapping[str, Any]]) -> None:
        """Under a lock: drop a torn tail, take in what is new in the file, append ``records``."""
        lines = [{**record, "crc32": zlib.crc32(json.dumps(record).encode())} for record in records]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if self._read_new(file) == 0:
                    lines = [self._header, *lines]
                if lines:
                    file.write(b"".join(json.dumps(line).encode() + b"\n" for line in lines))
                    file.flush()
                    os.fsync(file.fileno())
                    self._offset = file.tell()
        except OSError as error:
            raise cannot_write(path, error) from error
        for record in records:
            self._remember(record)

    def _read_new(self, file: IO[bytes]) -> int:
        """Take in complete lines after the known offset, cut off a torn one; the file's length after that."""
        file.seek(self._offset)
        data = file.read()
        complete = data.rfind(b"\n") + 1
        if complete < len(data):
            if self._offset == 0 and complete == 0 and not data.startswith(b'{"'):
                raise self._error("is not an evaluation file")
            file.truncate(self._offset + complete)
        for line in data[:complete].splitlines():
            if self._offset == 0:
                self._check_header(line)
            else:
                try:
                    self._remember(_checked(json.loads(line), self.num_samples))
                except (ValueError, RecursionError) as error:
                    raise self._error(f"is corrupt at byte {self._offset} ({error})") from error
            self._offset += len(line) + 1
        return self._offset

    def _check_header(self, line: bytes) -> None:
        try:
            header = json.loads(line)
        except ValueError as error:
            raise self._error("is not an evaluation file") from error
        FORMAT.check(header, repr(str(self.path)))
        names = sorted({*header, *self._header})
        other = {n: (header.get(n), self._header.get(n)) for n in names if header.get(n) != self._header.get(n)}
        if other:
            listed = ", ".join(f"{n}: file {a!r}, now {b!r}" for n, (a, b) in other.items())
            raise self._error(f"belongs to another search ({listed})")

    def _error(self, problem: str) -> CacheError:
        return CacheError(f"{str(self.path)!r} {problem}; {FORMAT.remedy}")


def _checked(line: Any, num_samples: int) -> dict[str, Any]:
    """The record of a line; ValueError saying what is wrong with it."""
    if not isinstance(line, dict):
        raise ValueError("a record must be an object")
    record = {name: value for name, value in line.items() if name != "crc32"}
    if set(record) != {"key", "samples", "kl_nats"} or not isinstance(record["key"], str):
        raise ValueError("a record has key, samples and kl_nats")
    if "crc32" in line and line["crc32"] != zlib.crc32(json.dumps(record).encode()):
        raise ValueError("its checksum is another")
    values = record["kl_nats"]
    if not isinstance(values, list) or not all(isinstance(x, (int, float)) and math.isfinite(x) for x in values):
        raise ValueError("kl_nats must be finite numbers")
    samples = range(num_samples) if record["samples"] is None else record["samples"]
    plain = isinstance(samples, range) or (isinstance(samples, list) and all(type(x) is int for x in samples))
    if not plain or len(samples) != len(values) or not all(0 <= x < num_samples for x in samples):
        raise ValueError(f"samples must be places within 0..{num_samples - 1}, one for each of kl_nats")
    return record
