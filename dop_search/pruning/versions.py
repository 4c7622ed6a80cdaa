"""Which version of its ranking a strategy runs with: part of every name that measured numbers are kept by."""

from __future__ import annotations

from dop_search.pruning.in_decoder import make_stage_selector
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy


def ranking_version(strategy: Strategy) -> int:
    """``version`` of the selectors that rank the strategy's tokens, before the decoder and inside it."""
    before, version = strategy.ranked_before, 0
    if before is not None:
        version += make_selector(*before).version
    if strategy.stages:
        version += make_stage_selector(strategy.selector, strategy.selector_options).version
    return version
