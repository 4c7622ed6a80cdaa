"""What runs and what it costs: operations, strategies, stages, prices. Pure Python and NumPy."""

from dop_search.strategy.strategy import Strategy

__all__ = ["Strategy"]
