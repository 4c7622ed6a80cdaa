"""FLOPs of a prefill in closed form (1 multiply-accumulate = 2 FLOPs).

Per layer, with ``n_q``, ``n_kv``, ``n_mlp`` tokens (text included) that run each module, hidden size ``d``,
MLP width ``m``, ``H`` query heads and ``H_kv`` key/value heads of width ``d_h``::

    q_proj, o_proj     2 * 2 * n_q * d * (H * d_h)
    k_proj, v_proj     2 * 2 * n_kv * d * (H_kv * d_h)
    scores, values     2 * 2 * n_q * n_kv * (H * d_h)
    mlp                2 * 3 * n_mlp * d * m            (2 * 2 where the MLP is not gated)
    with E experts     2 * n_mlp * d * (3 * k * m + E)  (k of width m per token, and the router)

Attention is not discounted for causality, as in the literature. Left out: norms, activations, RoPE, softmax,
embeddings, ``lm_head``, and the vision tower with its projector, which is reported beside this, never in it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from dop_search.strategy import Strategy
from dop_search.strategy.cost.prices import Counts, IntArray
from dop_search.strategy.operations import MODULES, ModelDims, Module, TokenCounts
from dop_search.utils.errors import StrategyError

Count = TypeVar("Count", int, NDArray[Any])


@dataclass(frozen=True)
class CostCoefficients:
    """Cost of one layer: ``q*n_q + kv*n_kv + score*n_q*n_kv + mlp*n_mlp``; the unit is the cost model's."""

    q: int
    kv: int
    score: int
    mlp: int

    def layer_cost(self, n_q: Count, n_kv: Count, n_mlp: Count) -> Count:
        """Cost of a layer in which so many tokens (text included) run each module."""
        cost: Count = self.q * n_q + self.kv * n_kv + self.score * (n_q * n_kv) + self.mlp * n_mlp
        return cost

    # The interface `LayerPrices`: one layer is the same sum, apart by module; nothing is paid beside the layers.

    def attention(self, text: Counts, queries: Counts, keys: Counts) -> IntArray:
        """See :class:`dop_search.strategy.cost.prices.LayerPrices`."""
        return np.asarray(self.q * queries + self.kv * keys + self.score * (queries * keys))

    def mlp_price(self, text: Counts, keys: Counts, mlps: Counts) -> IntArray:
        """See :class:`dop_search.strategy.cost.prices.LayerPrices`."""
        return np.asarray(self.mlp * mlps)

    def fixed(self, total: Counts) -> IntArray:
        """See :class:`dop_search.strategy.cost.prices.LayerPrices`."""
        return np.zeros_like(total)

    def full(self, total: Counts, num_layers: int) -> IntArray:
        """See :class:`dop_search.strategy.cost.prices.LayerPrices`."""
        return np.asarray(num_layers * self.layer_cost(total, total, total))


def flops_coefficients(dims: ModelDims) -> CostCoefficients:
    """FLOPs per token (``score``: per query-key pair) of one decoder layer."""
    return CostCoefficients(
        q=4 * dims.hidden_size * dims.query_width,
        kv=4 * dims.hidden_size * dims.kv_width,
        score=4 * dims.query_width,
        mlp=2 * dims.hidden_size * ((3 if dims.gated_mlp else 2) * dims.mlp_width + dims.num_experts),
    )


def layer_flops(dims: ModelDims, n_q: Count, n_kv: Count, n_mlp: Count) -> Count:
    """FLOPs of one decoder layer; integers or arrays of token counts, text included."""
    return flops_coefficients(dims).layer_cost(n_q, n_kv, n_mlp)


def layer_counts(strategy: Strategy, counts: TokenCounts) -> dict[Module, IntArray]:
    """Tokens (text included) that run each module, per layer ``[L]``, for the canonical form of ``strategy``."""
    visual = np.asarray(strategy.group_sizes(counts.visual), dtype=np.int64)
    runs = strategy.canonical().to_array()
    per_module = counts.text + np.einsum("g,glm->ml", visual, runs.astype(np.int64))
    return {module: per_module[index] for index, module in enumerate(MODULES)}


def strategy_flops(dims: ModelDims, strategy: Strategy, counts: TokenCounts) -> int:
    """FLOPs of one sample's prefill under the canonical form of ``strategy``.

    Raises:
        StrategyError: if the strategy is for another number of layers.
    """
    check_num_layers(dims, strategy)
    tokens = layer_counts(strategy, counts)
    return int(layer_flops(dims, tokens[Module.Q], tokens[Module.KV], tokens[Module.MLP]).sum())


def full_flops(dims: ModelDims, counts: TokenCounts) -> int:
    """FLOPs when every token runs every operation, dead ones included: the denominator of every ratio."""
    return dims.num_layers * layer_flops(dims, counts.total, counts.total, counts.total)


def check_num_layers(dims: ModelDims, strategy: Strategy) -> None:
    """Raise StrategyError if ``strategy`` is for a model of other depth than ``dims``."""
    if strategy.num_layers != dims.num_layers:
        raise StrategyError(
            f"the strategy is for {strategy.num_layers} layers, but the model has {dims.num_layers}; "
            "move it with `strategy.for_num_layers(...)` or search on this model"
        )
