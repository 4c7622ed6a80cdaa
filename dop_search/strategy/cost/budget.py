"""What a strategy may cost: a ratio of the full model or an absolute number per sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from dop_search.strategy.cost.model import CostKind, CostModel
from dop_search.utils.errors import BudgetError

_FIELDS: dict[str, tuple[CostKind, str, float]] = {
    "flops_ratio": ("flops", "", 1.0),
    "kv_ratio": ("kv_cache", "KV ", 1.0),
    "flops": ("flops", "FLOPs ", 1.0),
    "kv_bytes": ("kv_cache", "KV bytes ", 1.0),
    "latency_ratio": ("latency", "time ", 1.0),
    "latency_ms": ("latency", "ms ", 1e6),
}
"""What each limits, how texts call it, and the cost model's units in one unit of it."""


@dataclass(frozen=True)
class Budget:
    """An upper limit on the prefill cost; exactly one field is given.

    Attributes:
        flops_ratio: FLOPs relative to the full model, in (0, 1].
        kv_ratio: bytes of the KV cache relative to the full model, in (0, 1].
        flops: FLOPs per sample, mean over the validation set (1 MAC = 2 FLOPs, text included).
        kv_bytes: bytes of the KV cache per sample, mean over the validation set.
        latency_ratio: predicted prefill time relative to the full model, in (0, 1]; from layer times of this device.
        latency_ms: predicted prefill milliseconds per sample, mean over the validation set; from layer times as well.

    Raises:
        BudgetError: if not exactly one is given, or it is out of range.
    """

    flops_ratio: float | None = None
    kv_ratio: float | None = None
    flops: float | None = None
    kv_bytes: float | None = None
    latency_ratio: float | None = None
    latency_ms: float | None = None

    def __post_init__(self) -> None:
        given = [item.name for item in fields(self) if getattr(self, item.name) is not None]
        if len(given) != 1:
            names = ", ".join(f"`{item.name}`" for item in fields(self))
            raise BudgetError(f"exactly one of {names} must be given, but got {given or 'none'}")
        value = self.value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise BudgetError(f"`{self.name}` must be a number, but got ({self.name}={value!r})")
        try:
            value = float(value)
        except OverflowError:  # an integer of hundreds of digits
            value = math.inf if value > 0 else -math.inf
        if self.is_ratio and not 0.0 < value <= 1.0:
            hint = f"; for {value:g} % write {value / 100:g}" if 1.0 < value <= 100.0 else ""
            raise BudgetError(f"`0 < {self.name} <= 1` must hold, but got ({self.name}={value:g}){hint}")
        if not self.is_ratio and not 0.0 < value < float("inf"):
            raise BudgetError(f"`0 < {self.name} < inf` must hold, but got ({self.name}={value:g})")
        object.__setattr__(self, self.name, value)

    @classmethod
    def of(cls, plain: Budget | float | Mapping[str, Any]) -> Budget:
        """Inverse of :attr:`plain`; BudgetError if it is neither a number nor a mapping with one of the fields, or out
        of range."""
        if isinstance(plain, Budget):
            return plain
        given = plain if isinstance(plain, Mapping) else {"flops_ratio": plain}
        unknown = sorted(set(given) - set(_FIELDS))
        if unknown:
            raise BudgetError(f"a budget is one of {', '.join(_FIELDS)}, but got {unknown[0]!r}")
        return cls(**given)

    @property
    def name(self) -> str:
        """The field that is given."""
        return next(item.name for item in fields(self) if getattr(self, item.name) is not None)

    @property
    def value(self) -> float:
        """The number that is given, in the unit of :attr:`name`."""
        value: float = getattr(self, self.name)
        return value

    @property
    def plain(self) -> float | dict[str, float]:
        """As in JSON: a number for a FLOPs ratio, ``{name: value}`` for anything else."""
        return self.value if self.name == "flops_ratio" else {self.name: self.value}

    @property
    def text(self) -> str:
        """For tables and file names, e.g. ``0.3`` or ``KV 0.3``."""
        return f"{_FIELDS[self.name][1]}{self.value:g}"

    @property
    def is_ratio(self) -> bool:
        """Whether the limit is relative to the full model."""
        return self.name.endswith("_ratio")

    @property
    def kind(self) -> CostKind:
        """The cost model that the limit is about."""
        return _FIELDS[self.name][0]

    def resolve(self, cost_model: CostModel) -> float:
        """The limit as a ratio of the full model's cost, in (0, 1]; BudgetError if the cost model is of another kind,
        or an absolute limit exceeds the full model."""
        if cost_model.kind != self.kind:
            raise BudgetError(
                f"a budget of `{self.name}` needs a cost model of kind {self.kind!r}, but got {cost_model.kind!r}"
            )
        if self.is_ratio:
            return self.value
        full = cost_model.full / _FIELDS[self.name][2]
        ratio = self.value / full
        if ratio > 1.0:
            unit = self.name.split("_")[-1] if self.kind == "latency" else cost_model.unit
            raise BudgetError(
                f"`{self.name}` must not exceed the full model's {full:.6g} {unit} per "
                f"sample, but got ({self.name}={self.value:.6g}); a budget above that asks for no pruning"
            )
        return ratio

    def infeasible(self, cost_model: CostModel, smallest_ratio: float) -> BudgetError:
        """The error for a limit below ``smallest_ratio``, naming the smallest feasible value in its own unit."""
        scale = 1.0 if self.is_ratio else cost_model.full / _FIELDS[self.name][2]
        smallest, floor = smallest_ratio * scale, cost_model.floor_ratio * scale
        return BudgetError(
            f"no strategy of this space fits ({self.name}={self.value:.6g}): the smallest feasible value is "
            f"{_round_up(smallest):.6g}, of which the text tokens, which are never pruned, need {floor:.6g}; "
            f"raise `{self.name}`",
            smallest_feasible=smallest,
        )


def _round_up(value: float) -> float:
    """``value`` in six significant digits, not below it, so that what a message names is feasible."""
    step = 10.0 ** (math.floor(math.log10(value)) - 5) if value > 0 else 1.0
    return math.ceil(value / step) * step
