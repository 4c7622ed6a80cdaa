"""From a strategy to what each decoder layer does: which groups stay, which take part in which module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dop_search.strategy import Strategy
from dop_search.strategy.operations import Module
from dop_search.strategy.policy import GroupPolicy

Groups = frozenset[int]
"""Groups of tokens that take part; text tokens that are in no group always do."""


@dataclass(frozen=True)
class LayerStep:
    """One decoder layer: groups that are still in the sequence, and those that each module processes."""

    alive: Groups
    q: Groups
    kv: Groups
    mlp: Groups


def layer_steps(strategy: Strategy, further: Sequence[GroupPolicy] = ()) -> tuple[LayerStep, ...]:
    """The steps of the canonical form: a group leaves the sequence for good after its last operation.

    ``further``: policies of groups that are numbered after the strategy's, such as groups of text tokens.
    """
    groups = (*strategy.canonical().groups, *(policy.canonical() for policy in further))
    runs = {module: [frozenset(policy.layers(module)) for policy in groups] for module in Module}
    ranked = (*strategy.ranked_until(), *(0 for _ in further))
    last = [
        max([ranked[g] - 1, *(layer for module in Module for layer in runs[module][g])]) for g in range(len(groups))
    ]

    def taking_part(module: Module, layer: int) -> Groups:
        return frozenset(g for g in range(len(groups)) if layer in runs[module][g])

    return tuple(
        LayerStep(
            alive=frozenset(g for g in range(len(groups)) if layer <= last[g]),
            q=taking_part(Module.Q, layer),
            kv=taking_part(Module.KV, layer),
            mlp=taking_part(Module.MLP, layer),
        )
        for layer in range(strategy.num_layers)
    )
