"""Divergence curves: one parameter varies, all others are full (arXiv 2507.02909, additive approximation)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from scipy.interpolate import PchipInterpolator

from dop_search.search.space import Parameter, Space
from dop_search.search.store import EvaluationStore, FloatArray, OnProgress
from dop_search.search.surrogate import Surrogate
from dop_search.utils.errors import CacheError, ConfigError
from dop_search.utils.files import write_atomic
from dop_search.utils.versioned import Format

FORMAT = Format("a curves file", "dop_search.curves", 1, "measure the curves again")
_METADATA = b"dop_search.curves"
"""Key of the schema's metadata under which the facts are."""


@dataclass(frozen=True)
class CurveGrid:
    """At which levels curves are measured; ends are always included.

    Attributes:
        max_all_depths: with at most so many layers every depth is measured.
        num_depths: depths otherwise, evenly spaced.
        num_token_levels: numbers of visual tokens, geometrically spaced (small ones matter most).
        levels: explicit levels for single parameters by name, instead of the rules above.
    """

    max_all_depths: int = 16
    num_depths: int = 13
    num_token_levels: int = 16
    levels: Mapping[str, Sequence[int]] | None = None

    def __post_init__(self) -> None:
        if self.num_depths < 2 or self.num_token_levels < 2:
            raise ConfigError(
                "`num_depths >= 2` and `num_token_levels >= 2` must hold, but got "
                f"(num_depths={self.num_depths}, num_token_levels={self.num_token_levels})"
            )

    @classmethod
    def of(cls, num_depth_levels: int | None, num_token_levels: int) -> CurveGrid:
        """So many levels per curve; ``num_depth_levels=None``: every depth."""
        if num_depth_levels is None:
            return cls(max_all_depths=10_000, num_token_levels=num_token_levels)
        return cls(max_all_depths=0, num_depths=num_depth_levels, num_token_levels=num_token_levels)

    def for_parameter(self, parameter: Parameter) -> tuple[int, ...]:
        """The measured levels of a parameter, ascending, its lowest and its full level among them."""
        low, high = parameter.levels[0], parameter.full
        if self.levels is not None and parameter.name in self.levels:
            wanted: Sequence[float] = list(self.levels[parameter.name])
        elif parameter.role == "tokens":
            start = max(low, 1)
            wanted = np.geomspace(start, max(high, start), self.num_token_levels).tolist()
        elif len(parameter.levels) - 1 <= self.max_all_depths:
            wanted = parameter.levels
        else:
            wanted = np.linspace(low, high, self.num_depths).tolist()
        return tuple(sorted({low, high, *(parameter.nearest(value) for value in wanted)}))


@dataclass(frozen=True)
class Curve:
    """Measured divergence of one parameter; ``tokens`` are interpolated over ``log(1 + n)``, depths over the depth."""

    parameter: str
    role: str
    levels: NDArray[np.int64]  # [M], ascending; the last one is full
    per_sample_nats: FloatArray  # [M, num_samples]; zero at full by definition

    @property
    def mean_nats(self) -> FloatArray:
        """Mean over samples ``[M]``."""
        return np.asarray(self.per_sample_nats.mean(axis=1))

    def __call__(self, levels: Sequence[int] | NDArray[Any]) -> FloatArray:
        """Mean divergence at any levels: the measured values, PCHIP between them (no overshoot, no new extrema).

        Rounding may leave a measured value a hair below zero; a divergence is not, so it is cut at 0. ConfigError for
        levels outside the measured range.
        """
        wanted = np.asarray(levels, dtype=np.int64)
        if wanted.min() < self.levels[0] or wanted.max() > self.levels[-1]:
            raise ConfigError(
                f"the curve of {self.parameter!r} was measured from {self.levels[0]} to {self.levels[-1]}, "
                f"but levels {wanted.min()} to {wanted.max()} are asked for; measure it again"
            )
        if len(self.levels) == 1:
            return np.zeros(len(wanted))
        values = PchipInterpolator(self._coordinate(self.levels), self.mean_nats)(self._coordinate(wanted))
        return np.maximum(np.asarray(values, dtype=np.float64), 0.0)

    def _coordinate(self, levels: NDArray[np.int64]) -> FloatArray:
        return np.log1p(levels) if self.role == "tokens" else levels.astype(np.float64)


@dataclass(frozen=True)
class Curves:
    """The curves of a space and what measuring them took."""

    space_name: str
    curves: Mapping[str, Curve]
    num_validation_runs: int

    @classmethod
    def measure(
        cls, space: Space, store: EvaluationStore, grid: CurveGrid | None = None, on_progress: OnProgress | None = None
    ) -> Curves:
        """Measure the curve of every parameter, one validation run per level and none where nothing is skipped.

        All levels of all parameters go to the evaluator together, so that it can share prefixes.
        ``num_validation_runs`` counts distinct strategies, also those that the store already knew.
        """
        grid = grid or CurveGrid()
        levels = {p.name: grid.for_parameter(p) for p in space.parameters}
        points = [(name, level) for name in levels for level in levels[name]]
        strategies = {point: space.single(*point) for point in points}
        measured = {point: strategy for point, strategy in strategies.items() if not strategy.is_empty}
        what = f"divergence curves of {', '.join(space.names)}"
        values = store.evaluate(list(measured.values()), on_progress=on_progress, what=what)
        rows = dict(zip(measured, values, strict=True))
        zero = np.zeros(store.num_samples)
        curves = {
            p.name: Curve(
                p.name,
                p.role,
                np.array(levels[p.name], dtype=np.int64),
                np.stack([rows.get((p.name, level), zero) for level in levels[p.name]]),
            )
            for p in space.parameters
        }
        return cls(space.name, curves, len({strategy.key() for strategy in measured.values()}))

    def surrogate(self, space: Space) -> Surrogate:
        """The additive surrogate on ``space``, also with fewer levels; ConfigError if a curve misses a level."""
        missing = sorted(set(space.names) - set(self.curves))
        if missing:
            raise ConfigError(f"no curves for {missing} of space {space.name!r}; measured: {sorted(self.curves)}")
        return Surrogate(space, {p.name: self.curves[p.name](p.levels) for p in space.parameters})

    def save(self, path: str | Path) -> None:
        """Write Parquet, atomically: one row per parameter, level and sample, in nats."""
        parts = []
        for curve in self.curves.values():
            count, num_samples = curve.per_sample_nats.shape
            columns = {
                "parameter": [curve.parameter] * (count * num_samples),
                "role": [curve.role] * (count * num_samples),
                "level": np.repeat(curve.levels, num_samples),
                "sample": np.tile(np.arange(num_samples), count),
                "kl_nats": curve.per_sample_nats.ravel(),
            }
            parts.append(pa.table(columns))
        facts = {**FORMAT.stamp, "space": self.space_name, "num_validation_runs": self.num_validation_runs}
        table = pa.concat_tables(parts).replace_schema_metadata({_METADATA: json.dumps(facts)})
        write_atomic(Path(path), lambda temporary: pq.write_table(table, temporary))

    @classmethod
    def load(cls, path: str | Path) -> Curves:
        """Read what :meth:`save` wrote; CacheError if the file is missing, no curves file, or of another version."""
        try:
            table = pq.read_table(Path(path))
        except (OSError, pa.ArrowInvalid) as error:
            raise CacheError(f"cannot read curves from {str(path)!r} ({error}); measure them again") from error
        facts = FORMAT.check(json.loads((table.schema.metadata or {}).get(_METADATA, b"{}")), repr(str(path)))
        data = table.to_pandas()
        curves = {}
        for name, rows in data.groupby("parameter", sort=False):
            wide = rows.pivot(index="level", columns="sample", values="kl_nats").sort_index()
            role = str(rows["role"].iloc[0])
            curves[str(name)] = Curve(str(name), role, wide.index.to_numpy(np.int64), wide.to_numpy(np.float64))
        return cls(str(facts["space"]), curves, int(facts["num_validation_runs"]))
