"""Search spaces: named integer parameters and the strategy that an assignment of them stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dop_search.strategy import Strategy
from dop_search.strategy.operations import TokenGroup, group_sizes
from dop_search.utils.errors import ConfigError
from dop_search.utils.registry import unknown

Role = Literal["attention", "q", "kv", "mlp", "tokens"]
Assignment = Mapping[str, int]

TOKENS = "num_visual_tokens"


@dataclass(frozen=True)
class Parameter:
    """One searched integer.

    Attributes:
        name: unique within the space, e.g. ``mlp_depth`` or ``g1_kv_depth``.
        role: the module whose exit depth it is (``attention``: q and kv tied), or ``tokens``.
        levels: allowed values, ascending; the last one is "full", which skips nothing.
        group: token group, by rank; 0 for ``tokens``.
    """

    name: str
    role: Role
    levels: tuple[int, ...]
    group: int = 0

    @property
    def full(self) -> int:
        """The level that skips nothing."""
        return self.levels[-1]

    def nearest(self, value: float) -> int:
        """The allowed level nearest to ``value``; the higher one on a tie."""
        return min(self.levels, key=lambda level: (abs(level - value), -level))


@dataclass(frozen=True)
class Space:
    """A product of :class:`Parameter` levels; every point is a depth-wise strategy.

    A level of ``num_visual_tokens`` at its maximum stands for "all of a sample's visual tokens". Level 0 is
    not searched unless asked for (``min_visual_tokens=0``): it equals exit depth 0 of every ``kv``.

    Attributes:
        name: ``dop``, ``dop_split``, ``dop_full_kv``, ``dop_groups`` or ``uniform``.
        num_layers: decoder layers ``L``.
        parameters: what is searched; modules without a parameter are full.
        shares: share of the kept tokens per group, by rank.
        strategy_fields: further fields of every :class:`Strategy`: selector, fingerprint.
    """

    name: str
    num_layers: int
    parameters: tuple[Parameter, ...]
    shares: tuple[float, ...] = (1.0,)
    strategy_fields: Mapping[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        names = [parameter.name for parameter in self.parameters]
        if len(set(names)) != len(names) or TOKENS not in names:
            raise ConfigError(f"a space needs parameters of different names, {TOKENS!r} among them, but got {names}")
        group_sizes(tuple(TokenGroup(share) for share in self.shares), 1)  # raises on bad shares
        for parameter in self.parameters:
            top = None if parameter.role == "tokens" else self.num_layers
            levels = parameter.levels
            if not levels or list(levels) != sorted(set(levels)) or levels[0] < 0 or (top and levels[-1] != top):
                raise ConfigError(
                    f"levels of {parameter.name!r} must ascend from >= 0 to "
                    f"{'all visual tokens' if top is None else f'num_layers={top}'}, but got {list(levels)}"
                )

    @classmethod
    def dop(cls, num_layers: int, num_visual_tokens: int, min_visual_tokens: int = 1, **fields: Any) -> Space:
        """The paper's space (arXiv 2507.02909): ``D_A`` (q and kv tied), ``D_P`` and ``n_v``."""
        return cls._of("dop", num_layers, ("attention", "mlp"), num_visual_tokens, min_visual_tokens, fields)

    @classmethod
    def dop_split(cls, num_layers: int, num_visual_tokens: int, min_visual_tokens: int = 1, **fields: Any) -> Space:
        """Queries and keys/values get exit depths of their own."""
        return cls._of("dop_split", num_layers, ("q", "kv", "mlp"), num_visual_tokens, min_visual_tokens, fields)

    @classmethod
    def dop_full_kv(cls, num_layers: int, num_visual_tokens: int, min_visual_tokens: int = 1, **fields: Any) -> Space:
        """Queries and MLP; kept tokens stay keys in every layer, so that a server may share cached prefixes."""
        return cls._of("dop_full_kv", num_layers, ("q", "mlp"), num_visual_tokens, min_visual_tokens, fields)

    @classmethod
    def dop_groups(
        cls,
        num_layers: int,
        num_visual_tokens: int,
        shares: Sequence[float] = (0.25, 0.75),
        split: bool = True,
        min_visual_tokens: int = 1,
        **fields: Any,
    ) -> Space:
        """Kept tokens in groups by rank, each with depths of its own; ``split``: q and kv apart."""
        roles: tuple[Role, ...] = ("q", "kv", "mlp") if split else ("attention", "mlp")
        return cls._of("dop_groups", num_layers, roles, num_visual_tokens, min_visual_tokens, fields, tuple(shares))

    @classmethod
    def uniform(cls, num_layers: int, num_visual_tokens: int, min_visual_tokens: int = 1, **fields: Any) -> Space:
        """Token reduction alone: ``n_v`` visual tokens that run everything."""
        return cls._of("uniform", num_layers, (), num_visual_tokens, min_visual_tokens, fields)

    @classmethod
    def _of(
        cls,
        name: str,
        num_layers: int,
        roles: tuple[Role, ...],
        most: int,
        least: int,
        fields: Mapping[str, Any],
        shares: tuple[float, ...] = (1.0,),
    ) -> Space:
        """Every exit depth of each role and group, and ``least`` to ``most`` visual tokens."""
        if not 0 <= least <= most or most < 1:
            raise ConfigError(
                "`0 <= min_visual_tokens <= num_visual_tokens` must hold and there must be a visual token, but got "
                f"(min_visual_tokens={least}, num_visual_tokens={most})"
            )
        levels = tuple(range(num_layers + 1))
        depths = [
            Parameter(f"{f'g{group}_' if len(shares) > 1 else ''}{role}_depth", role, levels, group)
            for group in range(len(shares))
            for role in roles
        ]
        tokens = Parameter(TOKENS, "tokens", tuple(range(least, most + 1)))
        return cls(name, num_layers, (*depths, tokens), shares, fields)

    @property
    def names(self) -> tuple[str, ...]:
        """Parameter names, in order."""
        return tuple(parameter.name for parameter in self.parameters)

    @property
    def tokens(self) -> Parameter:
        """The parameter of the number of visual tokens."""
        return self.parameter(TOKENS)

    @property
    def full(self) -> dict[str, int]:
        """The assignment that skips nothing."""
        return {parameter.name: parameter.full for parameter in self.parameters}

    @property
    def num_assignments(self) -> int:
        """Points of the product, dead operations not yet merged."""
        total = 1
        for parameter in self.parameters:
            total *= len(parameter.levels)
        return total

    def parameter(self, name: str) -> Parameter:
        """Look a parameter up; ConfigError if the space has none of that name; the message names a near one."""
        for parameter in self.parameters:
            if parameter.name == name:
                return parameter
        raise ConfigError(f"space {self.name!r}: {unknown('parameter', name, self.names)}")

    def find(self, role: Role, group: int) -> Parameter | None:
        """The parameter of a module of a group, or ``None`` if that module is always full."""
        return next((p for p in self.parameters if p.role == role and p.group == group), None)

    def with_levels(self, levels: Mapping[str, Sequence[int]]) -> Space:
        """With fewer levels for the named parameters, "full" always among them; ConfigError on any other."""
        chosen = {}
        for name, values in levels.items():
            parameter = self.parameter(name)
            foreign = sorted(set(values) - set(parameter.levels))
            if foreign:
                raise ConfigError(
                    f"{name!r} has no levels {foreign}; it goes from {parameter.levels[0]} to {parameter.full}"
                )
            chosen[name] = replace(parameter, levels=tuple(sorted({*map(int, values), parameter.full})))
        return replace(self, parameters=tuple(chosen.get(p.name, p) for p in self.parameters))

    def strategy(self, assignment: Assignment) -> Strategy:
        """The canonical strategy of an assignment, what is not named full; ConfigError on a wrong name or level."""
        values = self.full
        for name, value in assignment.items():
            parameter = self.parameter(name)
            if value not in parameter.levels:
                raise ConfigError(
                    f"`{name}` must be one of its {len(parameter.levels)} levels from {parameter.levels[0]} to "
                    f"{parameter.full}, but got ({name}={value})"
                )
            values[name] = int(value)
        depths = {role: [self.num_layers] * len(self.shares) for role in ("q", "kv", "mlp")}
        for parameter in self.parameters:
            roles = ("q", "kv") if parameter.role == "attention" else (parameter.role,)
            for role in roles:
                if role != "tokens":
                    depths[role][parameter.group] = values[parameter.name]
        tokens = values[TOKENS]
        return Strategy.depthwise(
            self.num_layers,
            **depths,
            num_visual_tokens=None if tokens == self.tokens.full else tokens,
            shares=self.shares,
            **self.strategy_fields,
        ).canonical()

    def single(self, name: str, level: int) -> Strategy:
        """One parameter at ``level``, all others full: a point of that parameter's divergence curve."""
        return self.strategy({name: level})
