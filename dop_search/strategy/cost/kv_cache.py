"""Bytes of the key/value cache after prefill: ``2 * n_kv * (H_kv * d_h) * bytes_per_element`` per layer."""

from __future__ import annotations

from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import CostCoefficients, check_num_layers, layer_counts
from dop_search.strategy.operations import ModelDims, Module, TokenCounts


def kv_cache_coefficients(dims: ModelDims, bytes_per_element: int = 2) -> CostCoefficients:
    """Bytes per cached token and layer; queries and MLPs leave nothing in the cache."""
    return CostCoefficients(q=0, kv=2 * dims.kv_width * bytes_per_element, score=0, mlp=0)


def strategy_kv_bytes(dims: ModelDims, strategy: Strategy, counts: TokenCounts, bytes_per_element: int = 2) -> int:
    """Bytes of one sample's cache after prefill, text included.

    Raises:
        StrategyError: if the strategy is for another number of layers.
    """
    check_num_layers(dims, strategy)
    per_token = kv_cache_coefficients(dims, bytes_per_element).kv
    return per_token * int(layer_counts(strategy, counts)[Module.KV].sum())
