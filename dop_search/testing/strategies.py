"""Hypothesis generators of random strategies and rankings, and the corners of the space by name."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from dop_search.strategy import Strategy
from dop_search.strategy.operations import MODULES, TokenGroup
from dop_search.strategy.policy import GroupPolicy, Layers

_SHARES: tuple[tuple[float, ...], ...] = (
    (1.0,),
    (0.25, 0.75),
    (0.5, 0.5),
    (0.1, 0.9),
    (0.25, 0.25, 0.5),
    (0.2, 0.5, 0.3),
)


def exit_depths(num_layers: int) -> st.SearchStrategy[Layers]:
    """Layers ``< d`` (arXiv 2507.02909)."""
    return st.integers(0, num_layers).map(lambda depth: tuple(range(depth)))


def windows(num_layers: int) -> st.SearchStrategy[Layers]:
    """Layers ``[start, exit)``."""
    bound = st.integers(0, num_layers)
    return st.tuples(bound, bound).map(lambda ends: tuple(range(min(ends), max(ends))))


def layer_sets(num_layers: int) -> st.SearchStrategy[Layers]:
    """Any set of layers."""
    runs = st.lists(st.booleans(), min_size=num_layers, max_size=num_layers)
    return runs.map(lambda flags: tuple(layer for layer, flag in enumerate(flags) if flag))


@st.composite
def dop_strategies(
    draw: st.DrawFn, num_layers: int, max_visual_tokens: int = 24, max_groups: int = 3, selector: str = "explicit"
) -> Strategy:
    """Depth-wise strategies, windows and free layer sets over 1 to ``max_groups`` groups.

    ``num_visual_tokens`` is ``None``, 0 or anything up to a little above ``max_visual_tokens``. Hypothesis shrinks
    towards one group, exit depths and few layers.
    """
    shares = draw(st.sampled_from([shares for shares in _SHARES if len(shares) <= max_groups]))
    kind = draw(st.sampled_from([exit_depths, windows, layer_sets]))
    groups = []
    for share in shares:
        layers = {module.value: draw(kind(num_layers)) for module in MODULES}
        groups.append(GroupPolicy(group=TokenGroup(share), **layers))
    num_visual_tokens = draw(st.none() | st.integers(0, max_visual_tokens + 3))
    return Strategy(num_layers, tuple(groups), num_visual_tokens=num_visual_tokens, selector=selector)


def random_rankings(num_visual_tokens: list[int], seed: int) -> list[np.ndarray]:
    """One random permutation per sample."""
    generator = np.random.default_rng(seed)
    return [generator.permutation(count) for count in num_visual_tokens]


def _corners(num_layers: int, num_visual: int = 16) -> dict[str, Strategy]:
    def depthwise(q: int, kv: int, mlp: int, num_visual_tokens: int | None = None) -> Strategy:
        return Strategy.depthwise(num_layers, q, kv, mlp, num_visual_tokens, selector="explicit")

    last = num_layers
    sets = np.ones((2, num_layers, len(MODULES)), dtype=np.bool_)
    sets[0, 1:-1] = False
    sets[1, ::2] = False
    return {
        "no_visual_token": depthwise(last, last, last, 0),
        "one_visual_token": depthwise(last, last, last, 1),
        "half_of_the_tokens": depthwise(last, last, last, num_visual // 2),
        "no_operation": depthwise(0, 0, 0),
        "keys_only": depthwise(0, last, 0),
        "no_keys": depthwise(last, 0, last),
        "no_queries": depthwise(0, last, last),
        "no_mlp": depthwise(last, last, 0),
        "half_depth": depthwise(last // 2, last // 2, last // 2),
        "first_layer_only": depthwise(1, 1, 1, max(1, num_visual * 5 // 16)),
        "layer_sets": Strategy.from_array(
            sets, shares=[0.25, 0.75], num_visual_tokens=num_visual * 11 // 16, selector="explicit"
        ),
    }


CORNERS: tuple[str, ...] = tuple(_corners(2))
"""Names of the strategies at the corners of the space; none of them is empty."""


def corner_strategy(name: str, num_layers: int, selector: str = "explicit", num_visual: int = 16) -> Strategy:
    """The corner ``name`` for a model of ``num_layers >= 2`` layers and prompts of ``num_visual`` visual tokens."""
    return replace(_corners(num_layers, num_visual)[name], selector=selector)
