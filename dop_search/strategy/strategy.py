"""Which operations run: the strategy, its canonical form and its JSON file. Pure Python and NumPy."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from dop_search.strategy.operations import MODULES, Operation, TokenGroup, group_sizes
from dop_search.strategy.policy import GroupPolicy, check_fields, layers_text, parse_policy, policy_json
from dop_search.strategy.stages import check_stages, ranked_until
from dop_search.utils.addresses import local_file
from dop_search.utils.errors import StrategyError
from dop_search.utils.versioned import Format, write_json

FORMAT = Format("a strategy", "dop_search.strategy", 2, "update dop-search, or search again", StrategyError, oldest=1)
MAX_LAYERS = 10_000
"""More decoder layers than any model has: a number beyond is a mistake, and lists of so many would fill the memory."""


@dataclass(frozen=True)
class Strategy:
    """A set of operations on visual tokens that run; every other operation on a visual token is skipped.

    Text tokens keep all their operations (arXiv 2507.02909, section 3). The first ``num_visual_tokens``
    tokens of the selector's ranking enter the decoder (``None``: all), cut into groups by rank. That is done once for
    all images of a sample, or with ``per_image`` for each of them as if it were alone: what an engine needs, which has
    to know the tokens of an image before it encodes it.

    Attributes:
        num_layers: decoder layers of the model that the strategy is for.
        groups: one policy per token group, best-ranked tokens first.
        num_visual_tokens: visual tokens that enter the decoder; a fraction in (0, 1) is a share of those that are
            there, rounded half up; ``None`` keeps all.
        per_image: whether the selector ranks within each image (or video), and ``num_visual_tokens`` and the groups'
            shares are of each, instead of the sample's.
        selector: name of the ranking, see ``dop_search.selectors``.
        selector_options: keyword arguments of the selector; ``stages`` are layers that rank inside the decoder, and
            ``before``, ``{"selector": NAME, OPTION: …}``, chooses the ``num_visual_tokens`` that these stages rank.
        model_fingerprint: architecture that the strategy was searched on; ``None`` fits any model of
            ``num_layers`` layers.
        provenance: free-form facts about where the strategy comes from.
    """

    num_layers: int
    groups: tuple[GroupPolicy, ...]
    num_visual_tokens: int | float | None = None
    selector: str = "cls_attention"
    selector_options: Mapping[str, Any] = field(default_factory=dict, hash=False)
    model_fingerprint: str | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)
    per_image: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_layers", operator.index(self.num_layers))
        if not 1 <= self.num_layers <= MAX_LAYERS:
            raise StrategyError(f"`1 <= num_layers <= {MAX_LAYERS}` must hold, but got (num_layers={self.num_layers})")
        if not self.groups:
            raise StrategyError("a strategy needs at least one token group")
        if self.num_visual_tokens is not None:
            object.__setattr__(self, "num_visual_tokens", _count(self.num_visual_tokens))
        group_sizes(tuple(policy.group for policy in self.groups), 1)
        for index, policy in enumerate(self.groups):
            for module in MODULES:
                layers = policy.layers(module)
                if list(layers) != sorted(set(layers)) or any(not 0 <= x < self.num_layers for x in layers):
                    raise StrategyError(
                        f"the `{module.value}` layers of group {index} must be sorted, unique and within "
                        f"0..{self.num_layers - 1}, but got {list(layers)}"
                    )
        check_stages(self.groups, self.stages, self.num_layers, self.num_visual_tokens, self.ranked_before is not None)
        if not isinstance(self.per_image, bool):
            raise StrategyError(f"`per_image` must be True or False, but got {self.per_image!r}")
        if self.per_image and self.stages:
            raise StrategyError(
                f"selector {self.selector!r} ranks inside the decoder, where all images of a sample compete; leave "
                "`per_image` False"
            )

    # -- constructors ---------------------------------------------------------------------------

    @classmethod
    def depthwise(
        cls,
        num_layers: int,
        q: int | Sequence[int],
        kv: int | Sequence[int],
        mlp: int | Sequence[int],
        num_visual_tokens: int | float | None = None,
        shares: Sequence[float] | None = None,
        **fields: Any,
    ) -> Strategy:
        """Exit depths: module ``m`` of layers ``< depth`` runs (arXiv 2507.02909: ``D_A`` is q = kv).

        Args:
            num_layers: decoder layers ``L``.
            q, kv, mlp: exit depth in ``0..L``, one number or one per token group.
            num_visual_tokens: tokens that enter the decoder, ``None`` for all.
            shares: share of the kept tokens per group, by rank; must sum to 1. Default: one group.
            **fields: further fields of :class:`Strategy`.

        Raises:
            StrategyError: if a depth is outside ``0..L`` or the numbers of groups differ.
        """
        shares = [1.0] if shares is None else list(shares)
        depths: dict[str, list[int]] = {}
        for name, value in (("q", q), ("kv", kv), ("mlp", mlp)):
            values = [value] * len(shares) if isinstance(value, (int, np.integer)) else list(value)
            if len(values) != len(shares):
                raise StrategyError(f"`{name}` needs one depth per token group ({len(shares)}), but got {values}")
            for depth in values:
                if isinstance(depth, bool) or not isinstance(depth, (int, np.integer)) or not 0 <= depth <= num_layers:
                    raise StrategyError(
                        f"`0 <= {name} <= num_layers` must hold, but got ({name}={depth}, num_layers={num_layers})"
                    )
            depths[name] = [int(depth) for depth in values]
        groups = tuple(
            GroupPolicy(group=TokenGroup(share), **{name: tuple(range(values[i])) for name, values in depths.items()})
            for i, share in enumerate(shares)
        )
        return cls(num_layers=num_layers, groups=groups, num_visual_tokens=num_visual_tokens, **fields)

    @classmethod
    def full(cls, num_layers: int, **fields: Any) -> Strategy:
        """The empty strategy: nothing is skipped."""
        return cls.depthwise(num_layers, num_layers, num_layers, num_layers, **fields)

    @classmethod
    def from_array(
        cls,
        runs: np.ndarray,
        shares: Sequence[float] | None = None,
        num_visual_tokens: int | float | None = None,
        **fields: Any,
    ) -> Strategy:
        """The general form: ``runs[group, layer, module]`` (modules as in ``MODULES``) says what runs."""
        runs = np.asarray(runs)
        if runs.ndim != 3 or runs.shape[2] != len(MODULES) or runs.dtype != np.bool_:
            raise StrategyError(
                f"`runs` must be a boolean array [group, layer, {len(MODULES)}], but got {runs.dtype} {runs.shape}"
            )
        shares = [1.0 / runs.shape[0]] * runs.shape[0] if shares is None else list(shares)
        if len(shares) != runs.shape[0]:
            raise StrategyError(f"`shares` needs one entry per group ({runs.shape[0]}), but got {shares}")
        layers = [[tuple(np.flatnonzero(runs[g, :, m]).tolist()) for m in range(3)] for g in range(len(runs))]
        groups = tuple(
            GroupPolicy(q=q, kv=kv, mlp=mlp, group=TokenGroup(share))
            for (q, kv, mlp), share in zip(layers, shares, strict=True)
        )
        return cls(runs.shape[1], groups, num_visual_tokens, **fields)

    # -- views ----------------------------------------------------------------------------------

    def to_array(self) -> np.ndarray:
        """Boolean array ``[group, layer, module]`` of the operations that run."""
        runs = np.zeros((len(self.groups), self.num_layers, len(MODULES)), dtype=np.bool_)
        for g, policy in enumerate(self.groups):
            for m, module in enumerate(MODULES):
                runs[g, list(policy.layers(module)), m] = True
        return runs

    @property
    def stages(self) -> tuple[int, ...]:
        """The layers at whose door the visual tokens are ranked; empty if they are ranked before the decoder."""
        stages = self.selector_options.get("stages", ())
        if not isinstance(stages, (list, tuple)):
            raise StrategyError(f"`stages` must be a list of layers, but got {stages!r}")
        return tuple(stages)

    @property
    def ranked_before(self) -> tuple[str, dict[str, Any]] | None:
        """Name and options of the selector that ranks before the decoder; ``None`` where only stages rank."""
        if not self.stages:
            return self.selector, dict(self.selector_options)
        before = self.selector_options.get("before")
        if before is None:
            return None
        if not isinstance(before, Mapping) or "selector" not in before:
            raise StrategyError(f"`before` must be {{'selector': NAME, OPTION: VALUE, …}}, but got {before!r}")
        return before["selector"], {name: value for name, value in before.items() if name != "selector"}

    def ranked_until(self) -> tuple[int, ...]:
        """Per group the last stage that ranks it: its state is read there. 0 without stages."""
        return ranked_until(self.groups, self.stages, self.num_layers)

    def canonical(self) -> Strategy:
        """Without dead operations: a state matters only until it is last a key, or last ranked. Lossless."""
        ranked = zip(self.groups, self.ranked_until(), strict=True)
        return replace(self, groups=tuple(policy.canonical(stage) for policy, stage in ranked))

    @property
    def is_empty(self) -> bool:
        """Whether nothing but dead operations is skipped, so that every text logit is the full model's."""
        full = Strategy.full(self.num_layers).canonical().groups[0]
        same = all(replace(policy.canonical(), group=full.group) == full for policy in self.groups)
        return same and self.num_visual_tokens is None

    def skipped(self) -> tuple[Operation, ...]:
        """The operations that do not run, in the canonical form."""
        runs = self.canonical().to_array()
        return tuple(Operation(int(g), int(layer), MODULES[m]) for g, layer, m in np.argwhere(~runs))

    def depths(self) -> dict[str, tuple[int, ...]] | None:
        """Exit depth per module and group, or ``None`` if the strategy is not depth-wise."""
        result: dict[str, tuple[int, ...]] = {}
        for module in MODULES:
            values = [policy.depth(module) for policy in self.groups]
            if any(value is None for value in values):
                return None
            result[module.value] = tuple(value for value in values if value is not None)
        return result

    def depth_ratios(self) -> dict[str, tuple[float, ...]] | None:
        """Exit depth divided by the number of layers: what carries over to a model of other depth.

        A query or MLP depth that only leaves out dead operations counts as the depth of the keys, so that it stays
        lossless wherever the strategy goes.
        """
        depths = self.depths()
        if depths is None:
            return None
        lossless = {
            name: [kv if depth >= kv - 1 else depth for depth, kv in zip(values, depths["kv"], strict=True)]
            for name, values in depths.items()
        }
        return {name: tuple(depth / self.num_layers for depth in values) for name, values in lossless.items()}

    def parts(self, num_visual: int | Sequence[int]) -> tuple[int, ...]:
        """Visual tokens of what is ranked and cut by itself: of each image, or of all of a sample's together.

        ``num_visual``: visual tokens of the sample, image by image; a number is one image.
        """
        images = (num_visual,) if isinstance(num_visual, (int, np.integer)) else tuple(num_visual)
        return images if self.per_image else (sum(images),)

    def num_kept(self, num_visual: int | Sequence[int]) -> int:
        """Visual tokens that enter the decoder; the argument is that of :meth:`parts`."""
        return sum(self._kept(size) for size in self.parts(num_visual))

    def group_sizes(self, num_visual: int | Sequence[int]) -> tuple[int, ...]:
        """Kept visual tokens per group; the argument is that of :meth:`parts`."""
        groups = tuple(policy.group for policy in self.groups)
        sizes = [group_sizes(groups, self._kept(size)) for size in self.parts(num_visual)]
        return sizes[0] if len(sizes) == 1 else tuple(map(sum, zip(*sizes, strict=True))) or (0,) * len(groups)

    def _kept(self, size: int) -> int:
        if isinstance(self.num_visual_tokens, float):
            return int(self.num_visual_tokens * size + 0.5 + 1e-9)  # rounded as the groups' shares are
        return size if self.num_visual_tokens is None else min(self.num_visual_tokens, size)

    def key(self) -> str:
        """A string that two strategies share only when they compute the same function; names evaluations."""
        canonical = self.canonical()
        parts = [canonical.num_visual_tokens, _selector_json(canonical), [policy_json(p) for p in canonical.groups]]
        return json.dumps([*parts, "per_image"] if self.per_image else parts, sort_keys=True)

    def for_num_layers(self, num_layers: int) -> Strategy:
        """Move a depth-wise strategy to a model of other depth by its depth ratios (rounded); StrategyError if the
        strategy is not depth-wise."""
        ratios = self.depth_ratios()
        if ratios is None:
            raise StrategyError("only a depth-wise strategy can move to another depth; this one has free layer sets")
        if self.stages:
            raise StrategyError("a strategy with stages cannot move to another depth; fit the method on that model")
        scaled = {name: [int(ratio * num_layers + 0.5) for ratio in values] for name, values in ratios.items()}
        return Strategy.depthwise(
            num_layers,
            **scaled,
            num_visual_tokens=self.num_visual_tokens,
            per_image=self.per_image,
            shares=[policy.group.share for policy in self.groups],
            selector=self.selector,
            selector_options=self.selector_options,
            provenance={**self.provenance, "scaled_from_num_layers": self.num_layers},
        )

    def describe(self) -> str:
        """One line for tables, e.g. ``q≤8 kv≤10 mlp≤4 n_v=72``."""
        parts = []
        for policy in self.groups:
            prefix = f"{policy.group.share:.0%}: " if len(self.groups) > 1 else ""
            parts.append(prefix + " ".join(f"{m.value}{layers_text(policy.layers(m))}" for m in MODULES))
        return " | ".join(parts) + f" n_v={self.describe_tokens()}"

    def describe_tokens(self) -> str:
        """How many visual tokens enter, e.g. ``72``, ``25% per image`` or ``all``."""
        count = self.num_visual_tokens
        kept = "all" if count is None else f"{100 * count:g}%" if isinstance(count, float) else str(count)
        return f"{kept} per image" if self.per_image else kept

    # -- files ----------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready dictionary; exit depths are numbers, free layer sets are lists.

        Version 1, which counts a sample's tokens, unless the strategy needs version 2: per image, or a share.
        """
        newer = self.per_image or isinstance(self.num_visual_tokens, float)
        return {
            **FORMAT.stamp,
            "version": 2 if newer else 1,
            "num_layers": self.num_layers,
            "num_visual_tokens": self.num_visual_tokens,
            **({"per_image": self.per_image} if newer else {}),
            "groups": [policy_json(policy) for policy in self.groups],
            "depth_ratios": self.depth_ratios(),
            **_selector_json(self),
            "model_fingerprint": self.model_fingerprint,
            "provenance": dict(self.provenance),
        }

    @classmethod
    def from_json(cls, data: Any) -> Strategy:
        """Inverse of :meth:`to_json`; StrategyError saying which field is missing, unknown or wrong."""
        FORMAT.check(data)
        optional = _OPTIONAL if data["version"] == 1 else _OPTIONAL | _NEWER
        check_fields(data, _REQUIRED, optional, "strategy")
        if data["num_layers"] > MAX_LAYERS:
            raise StrategyError(f"`num_layers <= {MAX_LAYERS}` must hold, but got (num_layers={data['num_layers']})")
        groups = tuple(parse_policy(item, index, data["num_layers"]) for index, item in enumerate(data["groups"]))
        fields = {name: data[name] for name in optional if name in data and name != "depth_ratios"}
        return cls(num_layers=data["num_layers"], groups=groups, **fields)

    def save(self, path: str | Path) -> None:
        """Write the strategy as JSON, atomically."""
        write_json(path, self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Strategy:
        """Read a strategy.

        Args:
            path: of the file; or where MLflow keeps it, ``runs:/RUN/strategy.json`` or ``models:/NAME/VERSION`` (with
                the extra ``search``).

        Raises:
            StrategyError: if the file is not a strategy; the message says what is wrong.
        """
        with local_file(path) as file:
            data = FORMAT.read(file)
        try:
            return cls.from_json(data)
        except StrategyError as error:
            raise StrategyError(f"{str(path)!r}: {error}") from error


def _count(value: Any) -> int | float:
    """A number of visual tokens as a plain integer, or a share of them; NumPy's numbers are welcome."""
    if isinstance(value, (float, np.floating)) and 0.0 < value < 1.0:
        return float(value)
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
        raise StrategyError(
            "`num_visual_tokens >= 0` must hold for an integer, or `0 < num_visual_tokens < 1` for a share (None: "
            f"all), but got {value!r}"
        )
    return int(value)


def _selector_json(strategy: Strategy) -> dict[str, Any]:
    return {"selector": strategy.selector, "selector_options": dict(strategy.selector_options)}


_REQUIRED = {"format": str, "version": int, "num_layers": int, "groups": list}
_OPTIONAL = {
    "num_visual_tokens": (int, type(None)),
    "selector": str,
    "selector_options": dict,
    "model_fingerprint": (str, type(None)),
    "provenance": dict,
    "depth_ratios": (dict, type(None)),
}
_NEWER = {"num_visual_tokens": (int, float, type(None)), "per_image": bool}
