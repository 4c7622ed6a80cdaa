"""The price of a strategy on a validation set: exact sums over samples of different lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import check_num_layers, flops_coefficients
from dop_search.strategy.cost.kv_cache import kv_cache_coefficients
from dop_search.strategy.cost.latency import LatencyTable
from dop_search.strategy.cost.prices import IntArray, LayerPrices
from dop_search.strategy.operations import MODULES, LayerKind, ModelDims, Module, TokenCounts, TokenGroup, group_sizes
from dop_search.utils.errors import ConfigError, DataError

CostKind = Literal["flops", "kv_cache", "latency"]
_UNITS: dict[CostKind, str] = {"flops": "FLOPs", "kv_cache": "bytes", "latency": "ns"}


@dataclass(frozen=True)
class GroupPrices:
    """Prices summed over samples, for ``P`` numbers of visual tokens and every set of the ``G`` token groups.

    A set of groups is a bit mask: bit ``g`` says that group ``g`` takes part. Depth-wise policies meet few sets, so a
    layer's price is looked up, whatever function of the token counts it is.

    Attributes:
        kinds: of each layer the number of its kind ``[L]``.
        attention: ``[P, kinds, 2**G of the queries, 2**G of the keys]``.
        mlp: ``[P, 2**G of the MLP, 2**G of the keys]``.
        last: ``[P, 2**G of the keys]``: the last layer, in which only text tokens issue queries.
        fixed: price of the forwards beside their layers.
    """

    kinds: IntArray
    attention: IntArray
    mlp: IntArray
    last: IntArray
    fixed: int


class CostModel:
    """What a strategy costs on a set of samples, in total, per sample and relative to the full model.

    Args:
        dims: sizes of the decoder.
        counts: text and visual tokens of each validation sample.
        kind: ``"flops"`` (prefill), ``"kv_cache"`` (bytes after prefill) or ``"latency"`` (of prefill, by a table).
        bytes_per_element: of the cache; only for ``"kv_cache"``.
        latency: the measured table; only for ``"latency"``.

    Raises:
        DataError: if ``counts`` is empty.
        ConfigError: if the latency table is missing, of other sizes, or does not cover the samples.
    """

    def __init__(
        self,
        dims: ModelDims,
        counts: Sequence[TokenCounts],
        kind: CostKind = "flops",
        bytes_per_element: int = 2,
        latency: LatencyTable | None = None,
    ) -> None:
        if not counts:
            raise DataError("a cost model needs the token counts of at least one sample, but got none")
        self.dims = dims
        self.kind: CostKind = kind
        self.prices: list[LayerPrices] = [
            _prices(kind, dims, layers, counts, bytes_per_element, latency) for layers in sorted(set(dims.kinds))
        ]
        self._kinds = np.unique(dims.kinds, return_inverse=True)[1]
        self.num_samples = len(counts)
        unique = Counter(counts)
        self._weight = np.array(list(unique.values()), dtype=np.int64)
        self._text = np.array([item.text for item in unique], dtype=np.int64)
        self._visual = np.array([item.visual for item in unique], dtype=np.int64)
        self._images = [item.images for item in unique]
        tokens = self._text + self._visual
        num_layers = np.bincount(self._kinds).tolist()
        self.full_total = sum(
            self._sum(price.full(tokens, num)) for price, num in zip(self.prices, num_layers, strict=True)
        )
        self._fixed_total = self._sum(self.prices[0].fixed(tokens))
        if self.full_total >= 2**62:
            raise DataError(
                f"the cost of all {self.num_samples} samples together must fit 64-bit integers, but got "
                f"{self.full_total:.3g}; give fewer samples"
            )

    @property
    def unit(self) -> str:
        """Unit of :attr:`full` and :meth:`absolute`."""
        return _UNITS[self.kind]

    @property
    def max_visual_tokens(self) -> int:
        """Visual tokens of the largest sample: more than this cannot enter the decoder."""
        return int(self._visual.max())

    @property
    def full(self) -> float:
        """Cost of the full model, mean per sample."""
        return self.full_total / self.num_samples

    @property
    def floor_total(self) -> int:
        """Cost of the text tokens alone, summed over samples: no strategy on visual tokens goes below it."""
        return self.total(Strategy.depthwise(self.dims.num_layers, 0, 0, 0))

    @property
    def floor_ratio(self) -> float:
        """The smallest ratio any strategy can reach: text tokens keep all their operations."""
        return self.floor_total / self.full_total

    def total(self, strategy: Strategy) -> int:
        """Cost of ``strategy`` summed over the samples, exact; StrategyError if the strategy is for another number of
        layers."""
        check_num_layers(self.dims, strategy)
        sizes = {images: strategy.group_sizes(images) for images in set(self._images)}
        kept = np.array([sizes[images] for images in self._images], dtype=np.int64)  # [unique samples, G]
        runs = strategy.canonical().to_array().astype(np.int64)
        text = self._text[:, None]
        q, kv, mlp = (text + kept @ runs[:, :, MODULES.index(m)] for m in (Module.Q, Module.KV, Module.MLP))
        either = text + kept @ runs[:, :, [MODULES.index(Module.Q), MODULES.index(Module.KV)]].max(axis=2)
        cost = self.prices[0].mlp_price(text, kv, mlp).sum(axis=1)
        for kind, prices in enumerate(self.prices):
            its = self._kinds == kind
            cost = cost + prices.attention(text, q[:, its], kv[:, its], either[:, its]).sum(axis=1)
        return self._sum(cost) + self._fixed_total

    def absolute(self, strategy: Strategy) -> float:
        """Cost of ``strategy``, mean per sample, in :attr:`unit`."""
        return self.total(strategy) / self.num_samples

    def ratio(self, strategy: Strategy) -> float:
        """Cost of ``strategy`` over all samples divided by that of the full model."""
        return self.total(strategy) / self.full_total

    def group_prices(self, num_visual_tokens: Sequence[int], shares: Sequence[float]) -> GroupPrices:
        """Prices of every set of token groups of these shares, for each number of visual tokens."""
        groups = tuple(TokenGroup(share) for share in shares)
        table = np.array([group_sizes(groups, n) for n in range(self.max_visual_tokens + 1)], dtype=np.int64)
        limits = np.asarray(num_visual_tokens, dtype=np.int64)
        sets = np.arange(2 ** len(groups))
        member = (sets[:, None] >> np.arange(len(groups))) & 1  # [2**G, G]
        shape = (len(limits), len(sets), len(sets))
        attention = np.zeros((len(limits), len(self.prices), *shape[1:]), dtype=np.int64)
        mlp, last = np.zeros(shape, dtype=np.int64), np.zeros(shape[:2], dtype=np.int64)
        end = self.prices[self._kinds[-1]]
        for weight, text, visual in zip(self._weight, self._text, self._visual, strict=True):
            tokens = text + table[np.minimum(limits, visual)] @ member.T  # [P, 2**G]
            inner, keys, either = tokens[:, :, None], tokens[:, None, :], tokens[:, sets[:, None] | sets]
            for kind, prices in enumerate(self.prices):
                attention[:, kind] += weight * prices.attention(text, inner, keys, either)
            mlp += weight * end.mlp_price(text, keys, inner)
            last += weight * (end.attention(text, text, tokens, tokens) + end.mlp_price(text, tokens, text))
        return GroupPrices(self._kinds, attention, mlp, last, self._fixed_total)

    def _sum(self, per_sample: IntArray) -> int:
        return int((self._weight * per_sample).sum())


def _prices(
    kind: CostKind,
    dims: ModelDims,
    layers: LayerKind,
    counts: Sequence[TokenCounts],
    bytes_per_element: int,
    latency: LatencyTable | None,
) -> LayerPrices:
    if kind == "flops":
        return flops_coefficients(dims, layers)
    if kind == "kv_cache":
        return kv_cache_coefficients(dims, bytes_per_element, layers)
    if kind != "latency":
        raise ConfigError(f"`kind` must be one of {', '.join(get_args(CostKind))}, but got {kind!r}")
    if latency is None:
        raise ConfigError(
            "a latency budget needs a table of what was measured on this device: "
            "`dop_search.evaluation.timing.layer_times.measure_table(model, counts)`"
        )
    if len(set(dims.kinds)) > 1 or dims.recurrent is not None:
        raise ConfigError(
            "a latency budget needs layers of one kind, but some of this model's are recurrent or have other heads; "
            "use FLOPs"
        )
    latency.check_covers(dims, counts)
    return latency
