"""Bytes of the cache after prefill: ``2 * n_kv * (H_kv * d_h) * bytes_per_element`` per layer.

A recurrent layer keeps a state of one size instead, whatever tokens there were: its numbers in float32, and the last
features of its convolution.
"""

from __future__ import annotations

from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import CostCoefficients, check_num_layers, layer_counts
from dop_search.strategy.operations import LayerKind, ModelDims, TokenCounts


def kv_cache_coefficients(
    dims: ModelDims, bytes_per_element: int = 2, kind: LayerKind = LayerKind.ATTENTION
) -> CostCoefficients:
    """Bytes per cached token and layer, or per layer; queries and MLPs leave nothing in the cache."""
    if kind == LayerKind.RECURRENT and (sizes := dims.recurrent) is not None:
        state = 4 * sizes.state_size + bytes_per_element * sizes.window_size
        return CostCoefficients(q=0, kv=0, score=0, mlp=0, state=state)
    return CostCoefficients(q=0, kv=2 * dims.of_kind(kind).kv_width * bytes_per_element, score=0, mlp=0)


def strategy_kv_bytes(dims: ModelDims, strategy: Strategy, counts: TokenCounts, bytes_per_element: int = 2) -> int:
    """Bytes of one sample's cache after prefill, text included; StrategyError if the strategy is for another number of
    layers."""
    check_num_layers(dims, strategy)
    prices = (kv_cache_coefficients(dims, bytes_per_element, kind) for kind in dims.kinds)
    keys = layer_counts(strategy, counts).kv.tolist()
    return sum(price.kv * count + price.state for price, count in zip(prices, keys, strict=True))
