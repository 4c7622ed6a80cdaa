"""What strategies cost: FLOPs, KV-cache bytes, measured latency, budgets. Numbers only, no torch."""

from dop_search.strategy.cost.budget import Budget
from dop_search.strategy.cost.conventions import CONVENTIONS, Convention, convention
from dop_search.strategy.cost.flops import CostCoefficients, full_flops, layer_counts, layer_flops, strategy_flops
from dop_search.strategy.cost.kv_cache import full_kv_bytes, strategy_kv_bytes
from dop_search.strategy.cost.latency import LatencyTable
from dop_search.strategy.cost.model import CostKind, CostModel, GroupPrices

__all__ = [
    "CONVENTIONS",
    "Budget",
    "Convention",
    "CostCoefficients",
    "CostKind",
    "CostModel",
    "GroupPrices",
    "LatencyTable",
    "convention",
    "full_flops",
    "full_kv_bytes",
    "layer_counts",
    "layer_flops",
    "strategy_flops",
    "strategy_kv_bytes",
]
