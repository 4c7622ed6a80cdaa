"""Token groups that are distinguished inside the decoder: which of them a ranking between two layers may still mix.

A *stage* is a decoder layer at whose door the visual tokens are ranked from the decoder's own state. Until then all
groups are treated alike, since nobody knows which token belongs to which. Pure Python.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dop_search.strategy.operations import MODULES
from dop_search.strategy.policy import GroupPolicy
from dop_search.utils.errors import StrategyError

Pool = frozenset[int]
"""Groups whose tokens a stage ranks together."""


def first_differences(policies: Sequence[GroupPolicy], num_layers: int) -> tuple[int, ...]:
    """Per group the first layer in which it does otherwise than group 0; ``num_layers`` if it never does."""
    result = []
    for policy in policies:
        layers = [set(policy.layers(module)) ^ set(policies[0].layers(module)) for module in MODULES]
        result.append(min((min(difference) for difference in layers if difference), default=num_layers))
    return tuple(result)


def stage_pools(policies: Sequence[GroupPolicy], stages: Sequence[int], num_layers: int) -> tuple[Pool, ...]:
    """Per stage the groups that have done the same until then, group 0 among them."""
    differences = first_differences(policies, num_layers)
    return tuple(frozenset(g for g, layer in enumerate(differences) if layer >= stage) for stage in stages)


def ranked_until(policies: Sequence[GroupPolicy], stages: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """Per group the last stage that ranks it; 0 if none does."""
    pools = stage_pools(policies, stages, num_layers)
    return tuple(
        max((stage for stage, pool in zip(stages, pools, strict=True) if group in pool), default=0)
        for group in range(len(policies))
    )


def check_stages(
    policies: Sequence[GroupPolicy],
    stages: Sequence[Any],
    num_layers: int,
    num_visual_tokens: int | float | None,
    ranked_before: bool,
) -> None:
    """Refuse stages that cannot be run; StrategyError if the stages are no increasing layers, tokens would be dropped
    before anything ranks them, or groups differ in an operation before the ranking that separates them is known."""
    if not stages:
        return
    plain = all(isinstance(layer, int) and not isinstance(layer, bool) for layer in stages)
    if not plain or list(stages) != sorted(set(stages)) or not 0 <= stages[0] <= stages[-1] < num_layers:
        raise StrategyError(f"`stages` must be increasing layers within 0..{num_layers - 1}, but got {list(stages)}")
    if ranked_before != (num_visual_tokens is not None):
        raise StrategyError(
            "a selector with stages ranks inside the decoder, so that all visual tokens enter it, or as many as its "
            f"option `before` chooses: give both `before` and `num_visual_tokens` or neither, but got "
            f"(num_visual_tokens={num_visual_tokens}, {'with' if ranked_before else 'without'} `before`)"
        )
    for group, layer in enumerate(first_differences(policies, num_layers)):
        if layer < stages[0]:
            raise StrategyError(
                f"group {group} differs from group 0 in layer {layer}, but the tokens are first ranked at layer "
                f"{stages[0]}; let all groups do the same below it, or put a stage at or below layer {layer}"
            )
