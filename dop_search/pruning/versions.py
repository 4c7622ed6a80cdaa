"""Which version of its ranking a strategy runs with: part of every name that measured numbers are kept by."""

from __future__ import annotations

from dop_search.pruning.in_decoder import make_stage_selector
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy


def ranking_version(strategy: Strategy) -> int:
    """``version`` of the selector that ranks the strategy's tokens, before the decoder or inside it."""
    make = make_stage_selector if strategy.stages else make_selector
    return make(strategy.selector, strategy.selector_options).version
