"""The result of a study: a JSON file of rows that grows as they are measured, so that nothing is measured twice.

Several processes may measure the same study: each claims a group of rows before it measures them, by a lock that the
system releases when the process ends, however it ends.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import math
import os
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dop_search.utils.errors import CacheError, ConfigError, DataError, DopError, NumericalError
from dop_search.utils.files import write_text_atomic
from dop_search.utils.progress import Notify
from dop_search.utils.versioned import Format

log = logging.getLogger(__name__)

FORMAT = Format(
    "a study's result",
    "dop_search.study",
    1,
    "run the study first, or where the file is something else, set another study.folder",
    error=ConfigError,
)
RESULT_FILE = "result.json"
SAMPLES_FILE = "per_sample.json"
INFEASIBLE = "infeasible"
FAILED = "failed"
WAIT_S = 0.5

Row = dict[str, Any]
Key = Mapping[str, Any]


class ResultFile:
    """``result.json``: what the rows depend on, the rows, and a summary. Beside it ``per_sample.json`` for arrays.

    ``setup`` is what every row depends on (model, data, objective): a file with another setup is refused by
    ConfigError. A new file begins with the result in ``published``, if its setup is the same.
    """

    def __init__(self, folder: Path, study: str, setup: Mapping[str, Any], published: Path | None = None) -> None:
        self.folder = folder
        self.path = folder / RESULT_FILE
        self._fresh = {**FORMAT.stamp, "study": study, "setup": plain(setup)}
        self.data: dict[str, Any] = {**self._fresh, "rows": [], "summary": {}}
        self._samples: dict[str, list[float]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        self._claims = os.open(folder / ".claims", os.O_RDWR | os.O_CREAT)
        weakref.finalize(self, os.close, self._claims)  # locks last as long as it is open
        with self._locked():
            if published is not None and not self.path.exists():
                self._begin_with(published)

    def _begin_with(self, published: Path) -> None:
        if not (published / RESULT_FILE).is_file():
            return
        data = read_result(published / RESULT_FILE)
        if other := _differences(data, self._fresh):
            log.info("%s was measured with another setup (%s): every row is measured", published, other)
            return
        self.data, self._samples = data, _read_json(published / SAMPLES_FILE)
        self._save()

    @property
    def rows(self) -> list[Row]:
        """The rows so far; each is its key and what was measured."""
        rows: list[Row] = self.data["rows"]
        return rows

    @property
    def budgets(self) -> list[float]:
        """The budgets of all rows, also of those that this run does not ask for; the largest first."""
        return sorted({row["budget"] for row in self.rows if row.get("budget") is not None}, reverse=True)

    def refresh(self) -> None:
        """Read what other processes have written meanwhile."""
        with self._locked():
            pass

    def find(self, key: Key) -> Row | None:
        """The row of a key."""
        wanted = plain(key)
        return next((row for row in self.rows if all(row.get(name) == wanted[name] for name in wanted)), None)

    def per_sample(self, key: Key) -> np.ndarray | None:
        """What was measured per sample for a row, or ``None``."""
        values = self._samples.get(_name(key))
        return None if values is None else np.array(values)

    def add(self, key: Key, values: Mapping[str, Any], per_sample: Sequence[float] | np.ndarray | None = None) -> Row:
        """Put a row in place of the one with the same key, or at the end, and save."""
        row: Row = plain({**key, **values})
        with self._locked():
            old = self.find(key)
            if old is None:
                self.rows.append(row)
            else:
                self.rows[self.rows.index(old)] = row
            if per_sample is not None:
                self._samples[_name(key)] = [float(f"{value:.5g}") for value in per_sample]
            self._save(with_samples=per_sample is not None)
        return row

    def measure(
        self,
        keys: Sequence[Key],
        measure: Callable[..., Mapping[str, Any] | tuple[Mapping[str, Any], np.ndarray]],
        notify: Notify,
        what: str,
        group: Sequence[str] = (),
    ) -> list[Row]:
        """One row per key, in order; what is there is not measured again.

        ``measure(**key)`` returns the row's values, or these and an array per sample. What this model cannot have,
        such as a budget out of reach, makes a row with the reason under ``infeasible``. An error of the machinery makes
        one under ``failed``, which the next run tries again. A mistake in the configuration or the data ends the study.
        None of these loses the rows of others. ``group``: the parts of the key whose rows one process should measure.
        """
        mine: set[str] = set()
        while True:
            with self._locked():
                open_ = [key for key in keys if self._is_open(key, mine)]
                claim = next(
                    (name for name in dict.fromkeys(_claim(key, group) for key in open_) if self._take(name)), None
                )
            notify(len(keys) - len(open_), len(keys), what)
            if not open_:
                break
            if claim is None:
                time.sleep(WAIT_S)
                continue
            try:
                for key in [key for key in open_ if _claim(key, group) == claim]:
                    self._measure_row(key, measure, what)
                    mine.add(_name(key))
                    notify(sum(not self._is_open(item, mine) for item in keys), len(keys), what)
            finally:
                fcntl.lockf(self._claims, fcntl.LOCK_UN, 1, _place(claim))
        found = [self.find(key) for key in keys]
        return [row for row in found if row is not None]

    def sort(self, keys: Sequence[Key]) -> None:
        """Put the rows of ``keys`` in that order, before the others: processes that share rows finish in any."""
        place = {_name(key): index for index, key in enumerate(keys)}
        names = list(keys[0])
        with self._locked():
            self.rows.sort(key=lambda row: place.get(_name({name: row.get(name) for name in names}), len(place)))
            self._save(with_samples=False)

    def summarize(self, summary: Mapping[str, Any]) -> None:
        """Replace the summary and save; one that differs by rounding alone, as on other numbers of threads, stays."""
        new = plain(summary)
        with self._locked():
            if not _is_close(self.data["summary"], new):
                self.data["summary"] = new
                self._save(with_samples=False)

    def _is_open(self, key: Key, mine: set[str]) -> bool:
        row = self.find(key)
        return row is None or (FAILED in row and _name(key) not in mine)

    def _take(self, claim: str) -> bool:
        try:
            fcntl.lockf(self._claims, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, _place(claim))
        except (BlockingIOError, PermissionError):
            return False
        return True

    def _measure_row(self, key: Key, measure: Callable[..., Any], what: str) -> None:
        samples: np.ndarray | None = None
        try:
            values = measure(**key)
            if isinstance(values, tuple):
                values, samples = values
        except (ConfigError, DataError, CacheError):
            raise
        except NumericalError as error:
            values = {FAILED: f"{type(error).__name__}: {error}"}
        except DopError as error:
            values = {INFEASIBLE: str(error)}
        except (RuntimeError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            log.exception("%s %s failed", what, dict(key))
            values = {FAILED: f"{type(error).__name__}: {error}"}
        self.add(key, values, samples)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone with the files, which are read anew: other processes may have written."""
        with open(self.folder / ".lock", "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self.path.exists():
                self.data = read_result(self.path)
                if other := _differences(self.data, self._fresh):
                    raise ConfigError(
                        f"{str(self.path)!r} was measured with another setup ({other}); set study.folder to another "
                        "folder, or remove the file to measure anew"
                    )
            self._samples = _read_json(self.folder / SAMPLES_FILE)
            yield

    def _save(self, with_samples: bool = True) -> None:
        """Write with one line per row, so that a change of one row is a change of one line."""
        if with_samples and self._samples:
            samples = ",\n".join(f"{json.dumps(name)}: {json.dumps(values)}" for name, values in self._samples.items())
            write_text_atomic(self.folder / SAMPLES_FILE, "{\n" + samples + "\n}\n")
        head = json.dumps({name: value for name, value in self.data.items() if name != "rows"}, indent=1)
        rows = ",\n".join("  " + json.dumps(row) for row in self.rows)
        write_text_atomic(self.path, head.removesuffix("\n}") + ',\n "rows": [\n' + rows + "\n ]\n}\n")


def read_result(path: Path) -> dict[str, Any]:
    """What a study wrote; ConfigError if the file is no study's result of this version."""
    return FORMAT.read(path)


def _differences(data: Mapping[str, Any], fresh: Mapping[str, Any]) -> str:
    """What a result was measured with, beside what it would be measured with now; empty: the same."""
    old, new = (_flat({"study": item["study"], **item["setup"]}) for item in (data, fresh))
    return "; ".join(
        f"{name}: file {old.get(name)!r}, now {new.get(name)!r}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


def _is_close(old: Any, new: Any) -> bool:
    if isinstance(old, dict) and isinstance(new, dict):
        return old.keys() == new.keys() and all(_is_close(old[name], new[name]) for name in old)
    if isinstance(old, list) and isinstance(new, list):
        return len(old) == len(new) and all(map(_is_close, old, new))
    if isinstance(old, float) and isinstance(new, float):
        return math.isclose(old, new, rel_tol=1e-9, abs_tol=1e-15) or (math.isnan(old) and math.isnan(new))
    return bool(old == new)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys with dots, so that a message names what differs and nothing else."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = isinstance(value, dict) and value
        found |= _flat(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return found


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {str(path)!r} ({error}); remove it, and its rows are measured anew") from error
    return dict(data)


def plain(value: Any) -> Any:
    """The value as it comes back from JSON; what JSON lacks becomes text."""
    return json.loads(json.dumps(value, default=_as_json))


def _as_json(value: Any) -> Any:
    if hasattr(value, "tolist"):  # NumPy's arrays and numbers
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return dict(value) if isinstance(value, Mapping) else str(value)


def _name(key: Key) -> str:
    return json.dumps(plain(key), sort_keys=True)


def _place(claim: str) -> int:
    """The byte whose lock stands for a claim."""
    return int.from_bytes(hashlib.sha256(claim.encode()).digest()[:7], "big")


def _claim(key: Key, group: Sequence[str]) -> str:
    return _name({name: key[name] for name in group or key})
