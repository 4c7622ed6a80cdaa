"""A measured table of layer times as a price: what a prefill takes on one device, by interpolation.

The time of one layer in which ``v`` visual tokens are keys, beside ``t`` text tokens that do everything, is

    keys(t, v) + queries(t, v, f_q) + mlp(t, v, f_mlp)

where ``f_q`` and ``f_mlp`` are the shares of those ``v`` tokens that also issue queries and go through the MLP. A share
of 0 costs nothing more; a share of 1 was measured by itself, because it needs no index sets and allows plain causal
attention; shares between were measured at a few points. Between grid points times are interpolated linearly, and they
never fall with the number of tokens. A forward takes ``fixed`` beside its layers, and the unpruned model, the
denominator of ratios, was measured as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dop_search.strategy.cost.prices import Counts, IntArray
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.utils.errors import CacheError, ConfigError
from dop_search.utils.versioned import Format, write_json

FORMAT = Format("a latency table", "dop_search.latency_table", 1, "measure it again")

FloatArray = NDArray[np.float64]
ENVIRONMENT = (
    "device",
    "device_type",
    "num_threads",
    "dtype",
    "attn_implementation",
    "dims_fingerprint",
    "versions",
    "clock",
)
"""What a table belongs to; two tables that differ in any of these say nothing about each other."""


@dataclass(frozen=True)
class LatencyTable:
    """Times of decoder layers in milliseconds.

    Attributes:
        environment: device, dtype, attention backend, architecture and versions, see ``ENVIRONMENT``.
        num_layers: of the model.
        text: grid of text tokens ``[T]``, ascending.
        visual: grid of visual tokens that are keys ``[V]``, ascending from 0.
        shares: measured shares of them strictly between 0 and 1 ``[F]``; may be empty.
        keys_ms: ``[T, V]``.
        queries_ms: added when all of the keys also issue queries ``[T, V]``.
        mlp_ms: added when all of the keys also go through the MLP ``[T, V]``.
        queries_part_ms: the same for ``shares`` of them ``[T, V, F]``.
        mlp_part_ms: ``[T, V, F]``.
        lengths: grid of prompt lengths ``[N]``, ascending.
        fixed_ms: of a pruned forward, beside its layers ``[N]``.
        full_ms: of the unpruned decoder ``[N]``.
    """

    environment: Mapping[str, Any]
    num_layers: int
    text: tuple[int, ...]
    visual: tuple[int, ...]
    shares: tuple[float, ...]
    keys_ms: FloatArray
    queries_ms: FloatArray
    mlp_ms: FloatArray
    queries_part_ms: FloatArray
    mlp_part_ms: FloatArray
    lengths: tuple[int, ...]
    fixed_ms: FloatArray
    full_ms: FloatArray

    def __post_init__(self) -> None:
        grid = (len(self.text), len(self.visual))
        part, whole = (*grid, len(self.shares)), (len(self.lengths),)
        for name, shape in zip(_ARRAYS, (grid, grid, grid, part, part, whole, whole), strict=True):
            values = np.asarray(getattr(self, name), dtype=np.float64).reshape(shape)
            if not np.isfinite(values).all():
                raise CacheError(f"`{name}` of a latency table must be finite, but got {values}; measure it again")
            rising = values if name.endswith(("fixed_ms", "full_ms")) else np.maximum.accumulate(values, axis=1)
            object.__setattr__(self, name, np.maximum.accumulate(np.maximum(rising, 0.0), axis=0))
        for name in ("text", "visual", "lengths", "shares"):
            points = getattr(self, name)
            if list(points) != sorted(set(points)) or (name != "shares" and not points):
                raise CacheError(f"the grid `{name}` of a latency table must ascend, but got {points}")
        if self.visual[0] != 0 or not all(0.0 < share < 1.0 for share in self.shares):
            raise CacheError("a latency table starts at 0 visual tokens and has shares between 0 and 1")

    # -- prices ---------------------------------------------------------------------------------

    def attention(self, text: Counts, queries: Counts, keys: Counts, either: Counts) -> IntArray:
        """Nanoseconds of a layer's attention, norms, gathers and the text tokens' MLP."""
        base = self._at(self.keys_ms, text, keys - text)
        more = self._extra(self.queries_ms, self.queries_part_ms, text, keys - text, queries - text)
        return _nanoseconds(base) + _nanoseconds(more)

    def mlp_price(self, text: Counts, keys: Counts, mlps: Counts) -> IntArray:
        """Nanoseconds that the visual tokens' MLP adds."""
        return _nanoseconds(self._extra(self.mlp_ms, self.mlp_part_ms, text, keys - text, mlps - text))

    def fixed(self, total: Counts) -> IntArray:
        """Nanoseconds of a pruned forward beside its layers."""
        return _nanoseconds(np.interp(total, self.lengths, self.fixed_ms))

    def full(self, total: Counts, num_layers: int) -> IntArray:
        """Nanoseconds of the unpruned decoder."""
        self._check_layers(num_layers)
        return _nanoseconds(np.interp(total, self.lengths, self.full_ms))

    def _at(self, values: FloatArray, text: Counts, visual: Counts) -> FloatArray:
        """Bilinear interpolation of ``values[T, V]``."""
        by_text = [np.interp(visual, self.visual, row) for row in values]
        if len(by_text) == 1:
            return np.asarray(by_text[0])
        grid = np.asarray(self.text, dtype=np.float64)
        row = np.clip(np.searchsorted(grid, text, side="right") - 1, 0, len(grid) - 2)
        weight = (text - grid[row]) / (grid[row + 1] - grid[row])
        stacked = np.stack(np.broadcast_arrays(*by_text))
        row, weight = np.broadcast_to(row, stacked.shape[1:]), np.broadcast_to(weight, stacked.shape[1:])
        low = np.take_along_axis(stacked, row[None], axis=0)[0]
        high = np.take_along_axis(stacked, row[None] + 1, axis=0)[0]
        return np.asarray((1 - weight) * low + weight * high)

    def _extra(self, whole: FloatArray, part: FloatArray, text: Counts, keys: Counts, count: Counts) -> FloatArray:
        """What ``count`` of ``keys`` visual tokens add.

        Where more tokens take part than are keys (free layer sets only), the larger number stands for the keys.
        """
        around = np.maximum(keys, count)
        share = count / np.maximum(around, 1)
        every = self._at(whole, text, around)
        result = np.where(share >= 1.0, every, share * every)
        if not self.shares:
            return np.asarray(np.where(around > 0, result, 0.0))
        points = [self._at(part[:, :, index], text, around) for index in range(len(self.shares))]
        result = np.where((share > 0.0) & (share < 1.0), _between(self.shares, points, share), result)
        return np.asarray(np.where(around > 0, result, 0.0))

    # -- what it is for -------------------------------------------------------------------------

    def check_covers(self, dims: ModelDims, counts: Sequence[TokenCounts]) -> None:
        """Refuse another number of layers and samples outside the grid; ConfigError saying what was measured and what
        is asked for."""
        self._check_layers(dims.num_layers)
        for what, grid, values in (
            ("text", self.text, [item.text for item in counts]),
            ("visual", self.visual, [item.visual for item in counts]),
            ("total", self.lengths, [item.total for item in counts]),
        ):
            if min(values) < grid[0] or max(values) > grid[-1]:
                raise ConfigError(
                    f"the latency table covers {grid[0]} to {grid[-1]} {what} tokens, but the samples have "
                    f"{min(values)} to {max(values)}; measure it again for these samples"
                )

    def _check_layers(self, num_layers: int) -> None:
        if num_layers != self.num_layers:
            raise ConfigError(
                f"the latency table was measured on a model of {self.num_layers} layers, but this one has "
                f"{num_layers}; measure it on this model"
            )

    def check_environment(self, environment: Mapping[str, Any]) -> None:
        """Refuse a table of another model shape, device, dtype, attention backend or library version; ConfigError
        naming every difference."""
        differences = [
            f"{name}: measured on {self.environment.get(name)!r}, asked for {environment.get(name)!r}"
            for name in ENVIRONMENT
            if self.environment.get(name) != environment.get(name)
        ]
        if differences:
            raise ConfigError(
                "the latency table is not for this model on this device:\n  "
                + "\n  ".join(differences)
                + "\nMeasure it here"
            )

    # -- files ----------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary."""
        return {
            **FORMAT.stamp,
            "environment": dict(self.environment),
            "num_layers": self.num_layers,
            **{name: list(getattr(self, name)) for name in ("text", "visual", "shares", "lengths")},
            **{name: np.round(getattr(self, name), 6).tolist() for name in _ARRAYS},
        }

    @classmethod
    def from_json(cls, data: Any) -> LatencyTable:
        """Inverse of :meth:`to_json`; CacheError if it is no table of this version."""
        FORMAT.check(data)
        try:
            fields: dict[str, Any] = {name: tuple(data[name]) for name in ("text", "visual", "shares", "lengths")}
            fields |= {name: np.asarray(data[name], dtype=np.float64) for name in _ARRAYS}
            return cls(environment=data["environment"], num_layers=data["num_layers"], **fields)
        except (KeyError, TypeError, ValueError) as error:
            raise CacheError(f"a latency table is incomplete or malformed ({error}); measure it again") from error

    def save(self, path: str | Path) -> None:
        """Write the table as JSON, atomically."""
        write_json(path, self.to_json(), indent=1)

    @classmethod
    def load(cls, path: str | Path, environment: Mapping[str, Any] | None = None) -> LatencyTable:
        """Read a table; one of another environment than is given is refused.

        Raises:
            CacheError: if the file is no table.
            ConfigError: if it was measured elsewhere.
        """
        table = cls.from_json(FORMAT.read(path))
        if environment is not None:
            table.check_environment(environment)
        return table


_ARRAYS = ("keys_ms", "queries_ms", "mlp_ms", "queries_part_ms", "mlp_part_ms", "fixed_ms", "full_ms")


def _nanoseconds(milliseconds: FloatArray) -> IntArray:
    return np.round(np.asarray(milliseconds) * 1e6).astype(np.int64)


def _between(shares: Sequence[float], points: Sequence[FloatArray], share: Counts) -> FloatArray:
    """Piecewise linear in ``share`` through (0, 0) and the measured points, continued beyond the last one."""
    xs, ys = [0.0, *shares], [np.zeros_like(points[0]), *points]
    result = ys[0] + (ys[1] - ys[0]) * (share - xs[0]) / (xs[1] - xs[0])
    for left in range(1, len(xs) - 1):
        slope = (ys[left + 1] - ys[left]) / (xs[left + 1] - xs[left])
        result = np.where(share >= xs[left], ys[left] + slope * (share - xs[left]), result)
    return np.asarray(np.maximum(result, 0.0))
