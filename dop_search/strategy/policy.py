"""What one group of visual tokens does: the layers in which each module runs for it. Pure Python."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from dop_search.strategy.operations import MODULES, Module, TokenGroup
from dop_search.utils.errors import StrategyError

Layers = tuple[int, ...]
"""The decoder layers in which a module runs, sorted."""

ALL_KEPT = TokenGroup(1.0)
"""The single group of a strategy that treats all kept tokens alike."""


@dataclass(frozen=True)
class GroupPolicy:
    """For one token group: the layers in which each module processes it."""

    q: Layers
    kv: Layers
    mlp: Layers
    group: TokenGroup = ALL_KEPT

    def __post_init__(self) -> None:
        for module in MODULES:  # NumPy's integers are welcome, and written as plain ones
            object.__setattr__(self, module.value, tuple(operator.index(layer) for layer in self.layers(module)))

    def layers(self, module: Module) -> Layers:
        """The layers in which ``module`` runs."""
        layers: Layers = getattr(self, module.value)
        return layers

    def depth(self, module: Module) -> int | None:
        """The exit depth ``d`` when the module runs in exactly the layers ``< d``, else ``None``."""
        layers = self.layers(module)
        return len(layers) if layers == tuple(range(len(layers))) else None

    def canonical(self, ranked_at: int = 0) -> GroupPolicy:
        """Drop dead operations: a token's state is read where it is a key, and where it is ranked."""
        last_read = max(self.kv[-1] if self.kv else 0, ranked_at)
        return replace(
            self,
            q=tuple(layer for layer in self.q if layer < last_read),
            mlp=tuple(layer for layer in self.mlp if layer < last_read),
        )


def layers_text(layers: Layers) -> str:
    """Layers for people: a depth, a window or a list."""
    if layers == tuple(range(len(layers))):
        return f"≤{len(layers)}"
    if layers == tuple(range(layers[0], layers[-1] + 1)):
        return f"∈[{layers[0]},{layers[-1] + 1})"
    return "∈{" + ",".join(map(str, layers)) + "}"


def policy_json(policy: GroupPolicy) -> dict[str, Any]:
    """A policy as it is saved; exit depths as numbers."""
    result: dict[str, Any] = {"share": policy.group.share}
    for module in MODULES:
        depth = policy.depth(module)
        result[module.value] = list(policy.layers(module)) if depth is None else depth
    return result


def parse_policy(item: Any, index: int, num_layers: int) -> GroupPolicy:
    """Inverse of :func:`policy_json`; StrategyError saying what is wrong."""
    where = f"groups[{index}]"
    if not isinstance(item, dict):
        raise StrategyError(f"{where} must be an object, but got {item!r}")
    check_fields(item, {"share": (int, float), **{m.value: (int, list) for m in MODULES}}, {}, where)
    layers = {m.value: _parse_layers(item[m.value], num_layers, f"{where}.{m.value}") for m in MODULES}
    return GroupPolicy(group=TokenGroup(float(item["share"])), **layers)


def _parse_layers(value: int | list[Any], num_layers: int, where: str) -> Layers:
    if isinstance(value, list):
        if not all(isinstance(x, int) and not isinstance(x, bool) for x in value):
            raise StrategyError(f"{where} must list layer numbers, but got {value!r}")
        return tuple(value)
    if not 0 <= value <= num_layers:
        raise StrategyError(f"`0 <= {where} <= num_layers` must hold, but got ({value}, num_layers={num_layers})")
    return tuple(range(value))


def check_fields(data: dict[str, Any], required: Mapping[str, Any], optional: Mapping[str, Any], where: str) -> None:
    """Refuse missing and unknown fields of a file, and those of another type (``StrategyError``)."""
    missing = [name for name in required if name not in data]
    unknown = [name for name in data if name not in required and name not in optional]
    if missing or unknown:
        raise StrategyError(f"{where}: missing fields {missing}, unknown fields {unknown}")
    for name, types in {**required, **optional}.items():
        value = data.get(name)
        if name in data and (not isinstance(value, types) or (isinstance(value, bool) and types is not bool)):
            raise StrategyError(f"{where}: `{name}` has the wrong type: {value!r}")
