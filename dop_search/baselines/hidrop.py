"""HiDrop (ICLR 2026, arXiv 2602.23699), training-free: visual tokens enter late, leave in steps, and are gone early.

Up to the layer where they are injected visual tokens have no operation at all: text runs without them, and they enter
as the projector made them. From there on a pyramid of :data:`STAGES` drops most of them soon, by the attention of the
prompt's last token in the layer that comes next (PyramidDrop's criterion); at the exit layer the rest leaves. Published
for 32 layers: in before layer 8, stages at 10, 14, 16 and 18, out before layer 24, and of 576 tokens 87 / 215 (48 / 64
on average), then 10, 5 and 1 stay. Layers here are the same shares of the decoder's depth. The first number is solved
for FLOPs, as it is what differs between the published settings; where all tokens would be too cheap, the next ones are.

Not reproduced: the training, without which late injection costs far more than the paper says; the differentiable
choice, which picks the same tokens; positions, which the released code counts anew (the question as if there was no
image) and which stay here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dop_search.baselines.base import FitContext, FittedMethod, Method
from dop_search.baselines.equal_flops import nested_strategy
from dop_search.strategy import Strategy
from dop_search.strategy.policy import GroupPolicy
from dop_search.utils.errors import DopError

PUBLISHED_LAYERS = 32
ENTRY, STAGES, EXIT = 8, (10, 14, 16, 18), 24
LAST_COUNTS = (10, 5, 1, 0)
"""Tokens after the second and later stages and after the exit, of 576."""


@dataclass(frozen=True)
class HiDrop(Method):
    """Solved for the tokens that are left after the first stages."""

    name = "hidrop"

    def strategy(self, num_layers: int, num_visual: int, counts: tuple[int, ...]) -> Strategy:
        """``counts``: tokens left from each stage on, and from the exit on."""
        entry, *stages, last = (round(layer * num_layers / PUBLISHED_LAYERS) for layer in (ENTRY, *STAGES, EXIT))
        if len({entry, *stages, last}) < len(STAGES) + 2:
            raise DopError(f"HiDrop has {len(STAGES) + 2} different layers, for which {num_layers} are too few")
        options: dict[str, Any] = {"selector": "pyramiddrop", "selector_options": {"stages": stages}}
        nested = nested_strategy(num_layers, [*stages, last], [num_visual, *counts], **options)
        return Strategy(num_layers, tuple(_from(policy, entry) for policy in nested.groups), **options)

    def counts(self, num_visual: int, total: int) -> tuple[int, ...]:
        """Tokens after each stage and the exit: ``total`` after the first; what is more than all goes to the next."""
        first = min(total, num_visual)
        result = [first]
        for published in LAST_COUNTS:
            total = max(0, total - num_visual)
            own = max(int(published > 0), round(published * num_visual / 576))
            result.append(min(max(own, total), result[-1]))
        return tuple(result)

    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        layers, visual = context.num_layers, context.num_visual

        def make(total: int) -> Strategy:
            return self.strategy(layers, visual, self.counts(visual, total))

        total, strategy = context.solve(make, 0, visual * (len(STAGES) + 1), flops_ratio, "HiDrop")
        facts = {"counts": list(self.counts(visual, total)), "stages": list(strategy.stages)}
        return self.fitted(context, flops_ratio, strategy, facts)


def _from(policy: GroupPolicy, entry: int) -> GroupPolicy:
    """The same without operations below a layer."""
    q, kv, mlp = (tuple(x for x in layers if x >= entry) for layers in (policy.q, policy.kv, policy.mlp))
    return GroupPolicy(q, kv, mlp, policy.group)
