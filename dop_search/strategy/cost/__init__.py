"""What strategies cost: FLOPs, KV-cache bytes, measured latency, budgets. Numbers only, no torch."""

from dop_search.strategy.cost.budget import Budget
from dop_search.strategy.cost.flops import CostCoefficients, full_flops, layer_counts, layer_flops, strategy_flops
from dop_search.strategy.cost.kv_cache import strategy_kv_bytes
from dop_search.strategy.cost.latency import LatencyTable
from dop_search.strategy.cost.model import CostKind, CostModel, GroupPrices

__all__ = [
    "Budget",
    "CostCoefficients",
    "CostKind",
    "CostModel",
    "GroupPrices",
    "LatencyTable",
    "full_flops",
    "layer_counts",
    "layer_flops",
    "strategy_flops",
    "strategy_kv_bytes",
]
