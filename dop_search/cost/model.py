"""The price of a strategy on a validation set: exact sums over samples of different lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dop_search.cost.flops import CostCoefficients, IntArray, check_num_layers, flops_coefficients
from dop_search.cost.kv_cache import kv_cache_coefficients
from dop_search.errors import ConfigError, DataError
from dop_search.operations import MODULES, ModelDims, Module, TokenCounts, TokenGroup, group_sizes
from dop_search.strategy import Strategy

CostKind = Literal["flops", "kv_cache"]


@dataclass(frozen=True)
class TokenMoments:
    """Sums over samples that the cost of every strategy with these token groups depends on.

    With ``k_g`` the tokens of group ``g`` and ``t`` the text tokens of a sample, for ``P`` numbers of visual
    tokens and ``G`` groups, all integers:

    Attributes:
        tokens: ``sum k_g``, shape ``[P, G]``.
        text_pairs: ``sum t * k_g``, shape ``[P, G]``.
        unread_pairs: ``sum (text positions that are not read) * k_g``, shape ``[P, G]``.
        pairs: ``sum k_g * k_h``, shape ``[P, G, G]``.
    """

    tokens: IntArray
    text_pairs: IntArray
    unread_pairs: IntArray
    pairs: IntArray


class CostModel:
    """What a strategy costs on a set of samples, in total, per sample and relative to the full model.

    Args:
        dims: sizes of the decoder.
        counts: text and visual tokens of each validation sample.
        kind: ``"flops"`` (prefill) or ``"kv_cache"`` (bytes after prefill).
        bytes_per_element: of the cache; only for ``"kv_cache"``.
        last_layer_read_tokens: text positions whose logits are read, see :func:`layer_counts`; the full
            model, the denominator, always runs everything. Only for ``"flops"``.

    Raises:
        DataError: if ``counts`` is empty.
    """

    def __init__(
        self,
        dims: ModelDims,
        counts: Sequence[TokenCounts],
        kind: CostKind = "flops",
        bytes_per_element: int = 2,
        last_layer_read_tokens: int | None = None,
    ) -> None:
        if not counts:
            raise DataError("a cost model needs the token counts of at least one sample, but got none")
        if kind == "flops":
            self.coefficients: CostCoefficients = flops_coefficients(dims)
        elif kind == "kv_cache":
            self.coefficients = kv_cache_coefficients(dims, bytes_per_element)
        else:
            raise ConfigError(f"`kind` must be 'flops' or 'kv_cache', but got {kind!r}")
        self.dims = dims
        self.kind: CostKind = kind
        self.num_samples = len(counts)
        unique = Counter(counts)
        self._weight = np.array(list(unique.values()), dtype=np.int64)
        self._text = np.array([item.text for item in unique], dtype=np.int64)
        self._visual = np.array([item.visual for item in unique], dtype=np.int64)
        read = self._text if last_layer_read_tokens is None else np.minimum(self._text, last_layer_read_tokens)
        self._unread = self._text - read
        tokens = self._text + self._visual
        self.full_total = self._sum(dims.num_layers * self.coefficients.layer_cost(tokens, tokens, tokens))
        assert self.full_total < 2**62, "the sum over samples must fit 64-bit integers"

    @property
    def unit(self) -> str:
        """Unit of :attr:`full` and :meth:`absolute`."""
        return {"flops": "FLOPs", "kv_cache": "bytes"}[self.kind]

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
        per_layer = self.coefficients.layer_cost(self._text, self._text, self._text)
        saved = self._unread * (self.coefficients.q + self.coefficients.mlp + self.coefficients.score * self._text)
        return self._sum(self.dims.num_layers * per_layer - saved)

    @property
    def floor_ratio(self) -> float:
        """The smallest ratio any strategy can reach: text tokens keep all their operations."""
        return self.floor_total / self.full_total

    def total(self, strategy: Strategy) -> int:
        """Cost of ``strategy`` summed over the samples, exact.

        Raises:
            StrategyError: if the strategy is for another number of layers.
        """
        check_num_layers(self.dims, strategy)
        groups = tuple(policy.group for policy in strategy.groups)
        sizes = {int(v): group_sizes(groups, strategy.num_kept(int(v))) for v in np.unique(self._visual)}
        kept = np.array([sizes[int(v)] for v in self._visual], dtype=np.int64)  # [unique samples, G]
        runs = strategy.canonical().to_array().astype(np.int64)
        tokens = {m: self._text[:, None] + kept @ runs[:, :, i] for i, m in enumerate(MODULES)}
        for module in (Module.Q, Module.MLP):
            tokens[module][:, -1] -= self._unread
        cost = self.coefficients.layer_cost(tokens[Module.Q], tokens[Module.KV], tokens[Module.MLP])
        return self._sum(cost.sum(axis=1))

    def absolute(self, strategy: Strategy) -> float:
        """Cost of ``strategy``, mean per sample, in :attr:`unit`."""
        return self.total(strategy) / self.num_samples

    def ratio(self, strategy: Strategy) -> float:
        """Cost of ``strategy`` over all samples divided by that of the full model."""
        return self.total(strategy) / self.full_total

    def moments(self, num_visual_tokens: Sequence[int], shares: Sequence[float]) -> TokenMoments:
        """The sums over samples for each number of visual tokens, for token groups of these shares."""
        groups = tuple(TokenGroup(share) for share in shares)
        table = np.array([group_sizes(groups, n) for n in range(self.max_visual_tokens + 1)], dtype=np.int64)
        limits = np.asarray(num_visual_tokens, dtype=np.int64)
        shape = (len(limits), len(groups))
        tokens, text_pairs, unread_pairs = (np.zeros(shape, dtype=np.int64) for _ in range(3))
        pairs = np.zeros((*shape, len(groups)), dtype=np.int64)
        for weight, text, unread, visual in zip(self._weight, self._text, self._unread, self._visual, strict=True):
            kept = table[np.minimum(limits, visual)]
            tokens += weight * kept
            text_pairs += weight * text * kept
            unread_pairs += weight * unread * kept
            pairs += weight * kept[:, :, None] * kept[:, None, :]
        return TokenMoments(tokens, text_pairs, unread_pairs, pairs)

    def _sum(self, per_sample: IntArray) -> int:
        return int((self._weight * per_sample).sum())
