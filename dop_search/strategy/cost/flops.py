"""FLOPs of a prefill in closed form (1 multiply-accumulate = 2 FLOPs).

Per layer, with ``n_q``, ``n_kv``, ``n_mlp`` tokens (text included) that run each module, hidden size ``d``,
MLP width ``m``, ``H`` query heads and ``H_kv`` key/value heads of width ``d_h``::

    q_proj, o_proj     2 * 2 * n_q * d * (H * d_h)
    k_proj, v_proj     2 * 2 * n_kv * d * (H_kv * d_h)
    scores, values     2 * 2 * n_q * n_kv * (H * d_h)
    mlp                2 * 3 * n_mlp * d * m            (2 * 2 where the MLP is not gated)
    with E experts     2 * n_mlp * d * (3 * k * m + E)  (k of width m per token, and the router)
    shared expert      2 * n_mlp * d * (3 * m_s + 1)    (and its gate, where it has one)
    gated queries      q_proj is twice as wide
    other heads        some layers with their own H_kv and d_h; k_proj alone where it makes the values as well

A recurrent layer projects ``w_in`` features of the ``n`` tokens that update its state or read it, whose ``s`` numbers
meet a key, a change and a query per token, and ``w_out`` features (gate and output) of those that read it::

    projections        2 * n * d * w_in + 2 * n_q * d * w_out
    recurrence         2 * 3 * n * s                    (token by token; kernels that work in chunks multiply more)

Attention is not discounted for causality, as in the literature. Left out: norms, activations, RoPE, softmax, short
convolutions, embeddings, ``lm_head``, and the vision tower with its projector, which is reported beside this, never in
it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from dop_search.strategy import Strategy
from dop_search.strategy.cost.prices import Counts, IntArray
from dop_search.strategy.operations import MODULES, LayerKind, ModelDims, TokenCounts
from dop_search.strategy.policy import GroupPolicy
from dop_search.utils.errors import StrategyError

Count = TypeVar("Count", int, NDArray[Any])


@dataclass(frozen=True)
class CostCoefficients:
    """Cost of one layer, in the cost model's unit::

        q * n_q + kv * n_kv + score * n_q * n_kv + mlp * n_mlp + either * n + state

    where ``n`` tokens issue a query, offer a key, or both.
    """

    q: int
    kv: int
    score: int
    mlp: int
    either: int = 0
    state: int = 0

    def layer_cost(self, n_q: Count, n_kv: Count, n_mlp: Count, n_either: Count | None = None) -> Count:
        """Cost of a layer in which so many tokens (text included) run each module; ``n_either``: the most of them."""
        cost: Count = self.q * n_q + self.kv * n_kv + self.score * (n_q * n_kv) + self.mlp * n_mlp + self.state
        if self.either:
            either: Any = np.maximum(n_q, n_kv) if n_either is None else n_either
            cost += self.either * either
        return cost

    # The interface `LayerPrices`: one layer is the same sum, apart by module; nothing is paid beside the layers.

    def attention(self, text: Counts, queries: Counts, keys: Counts, either: Counts) -> IntArray:
        return np.asarray(self.layer_cost(queries, keys, np.zeros_like(queries), either))

    def mlp_price(self, text: Counts, keys: Counts, mlps: Counts) -> IntArray:
        return np.asarray(self.mlp * mlps)

    def fixed(self, total: Counts) -> IntArray:
        return np.zeros_like(total)

    def full(self, total: Counts, num_layers: int) -> IntArray:
        return np.asarray(num_layers * self.layer_cost(total, total, total, total))


def flops_coefficients(dims: ModelDims, kind: LayerKind = LayerKind.ATTENTION) -> CostCoefficients:
    """FLOPs per token (``score``: per query-key pair) of one decoder layer of a kind."""
    width, dims = dims.hidden_size, dims.of_kind(kind)
    routed = dims.num_experts + (dims.shared_expert_size > 0 and dims.shared_expert_gate)
    mlp = 2 * width * ((3 if dims.gated_mlp else 2) * dims.mlp_width + routed)
    if kind == LayerKind.RECURRENT and (sizes := dims.recurrent) is not None:
        either = 2 * width * sizes.in_width + 6 * sizes.state_size
        return CostCoefficients(q=2 * width * sizes.out_width, kv=0, score=0, mlp=mlp, either=either)
    others = dims.other_heads if kind == LayerKind.OTHER_HEADS else None
    shared = others is not None and others.values_are_keys  # one projection makes both
    return CostCoefficients(
        q=(6 if dims.gated_queries else 4) * width * dims.query_width,
        kv=(2 if shared else 4) * width * dims.kv_width,
        score=4 * dims.query_width,
        mlp=mlp,
    )


def layer_flops(dims: ModelDims, n_q: Count, n_kv: Count, n_mlp: Count) -> Count:
    """FLOPs of one decoder layer that attends; integers or arrays of token counts, text included."""
    return flops_coefficients(dims).layer_cost(n_q, n_kv, n_mlp)


class LayerCounts(NamedTuple):
    """Tokens (text included) that run each module, and those that run queries or keys, per layer ``[L]``."""

    q: IntArray
    kv: IntArray
    mlp: IntArray
    either: IntArray

    @classmethod
    def everything(cls, tokens: Sequence[int] | IntArray) -> LayerCounts:
        """So many tokens do everything in each layer."""
        return cls(*[np.asarray(tokens, dtype=np.int64)] * 4)

    def plus(self, policy: GroupPolicy, size: int) -> LayerCounts:
        """With ``size`` tokens more that do what the policy says."""
        runs = [np.isin(np.arange(len(self.q)), sorted(policy.layers(module))) for module in MODULES]
        return LayerCounts(*(its + size * run for its, run in zip(self, [*runs, runs[0] | runs[1]], strict=True)))


def layer_counts(strategy: Strategy, counts: TokenCounts) -> LayerCounts:
    """Of one sample under the canonical form of ``strategy``."""
    result = LayerCounts.everything([counts.text] * strategy.num_layers)
    groups = strategy.canonical().groups
    for policy, size in zip(groups, strategy.group_sizes(counts.images), strict=True):
        result = result.plus(policy, size)
    return result


def total_flops(dims: ModelDims, tokens: LayerCounts) -> int:
    """FLOPs of all layers."""
    kinds, total = np.array(dims.kinds), 0
    for kind in set(dims.kinds):
        cost = flops_coefficients(dims, kind).layer_cost(*(its[kinds == kind] for its in tokens))
        total += int(cost.sum())
    return total


def strategy_flops(dims: ModelDims, strategy: Strategy, counts: TokenCounts) -> int:
    """FLOPs of one sample's prefill under the canonical form of ``strategy``; StrategyError if the strategy is for
    another number of layers."""
    check_num_layers(dims, strategy)
    return total_flops(dims, layer_counts(strategy, counts))


def full_flops(dims: ModelDims, counts: TokenCounts) -> int:
    """FLOPs when every token runs every operation, dead ones included: the denominator of every ratio."""
    return total_flops(dims, LayerCounts.everything([counts.total] * dims.num_layers))


def check_num_layers(dims: ModelDims, strategy: Strategy) -> None:
    """Raise StrategyError if ``strategy`` is for a model of other depth than ``dims``."""
    if strategy.num_layers != dims.num_layers:
        raise StrategyError(
            f"the strategy is for {strategy.num_layers} layers, but the model has {dims.num_layers}; "
            "move it with `strategy.for_num_layers(...)` or search on this model"
        )
