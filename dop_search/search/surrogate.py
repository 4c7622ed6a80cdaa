"""The additive surrogate ``D(s) ~ sum_p D_p(v_p)`` (arXiv 2507.02909)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dop_search.search.space import Assignment, Space
from dop_search.search.store import FloatArray
from dop_search.utils.errors import ConfigError

IntArray = NDArray[np.int64]

RESOLUTION_NATS = 2.0**-42
"""Curve values are rounded to multiples of this (2e-13), so that sums up to 2,000 nats are exact in any order."""


class Surrogate:
    """Estimated divergence of any assignment of a space, from one curve per parameter.

    A query or MLP depth of ``kv - 1`` or more (``kv``: the exit depth of the same group's keys and values) is
    the same function of the text tokens, because what lies beyond is dead. All such levels therefore get the
    smallest of their curve values, which is 0 as "full" is among them: dead operations cost nothing.

    Sums are exact (see ``RESOLUTION_NATS``), so two assignments of equal divergence compare as equal.

    Args:
        space: the parameters.
        curves: mean divergence in nats at each of the parameter's levels, by name.

    Raises:
        ConfigError: if a curve is missing, has the wrong length or is not finite.
    """

    def __init__(self, space: Space, curves: Mapping[str, Sequence[float] | NDArray[Any]]) -> None:
        self.space = space
        self.kept: dict[object, dict[str, Any]] = {}  # what the exact solvers keep for each cost model
        self.curves: dict[str, FloatArray] = {}
        for parameter in space.parameters:
            values = np.asarray(curves.get(parameter.name, ()), dtype=np.float64)
            if values.shape != (len(parameter.levels),) or not np.isfinite(values).all():
                raise ConfigError(
                    f"the curve of {parameter.name!r} needs {len(parameter.levels)} finite values, one per level, "
                    f"but got {values}"
                )
            self.curves[parameter.name] = np.round(values / RESOLUTION_NATS) * RESOLUTION_NATS

    def __call__(self, assignment: Assignment) -> float:
        """Estimated divergence in nats of one assignment; parameters that are not named are full."""
        values = {**self.space.full, **assignment}
        self.space.strategy(values)  # raises on unknown names and levels
        total = 0.0
        for parameter in self.space.parameters:
            curve, level = self.curves[parameter.name], values[parameter.name]
            if parameter.role in ("q", "mlp"):
                bound = self.space.find("kv", parameter.group) or self.space.find("attention", parameter.group)
                last = max(0, (self.space.num_layers if bound is None else values[bound.name]) - 1)
                if level >= last:
                    total += float(curve[np.array(parameter.levels) >= last].min())
                    continue
            total += float(curve[parameter.levels.index(level)])
        return total
