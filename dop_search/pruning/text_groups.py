"""Text tokens of the prompt as further groups, so that their operations can be skipped as those of visual tokens are.

An extension of the paper, which prunes visual tokens only; a :class:`dop_search.strategy.Strategy` does not express it.
The prompt's last token and everything that is generated always run every operation: that is where answers are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dop_search.pruning.layout import TEXT
from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import layer_counts, total_flops
from dop_search.strategy.operations import ModelDims, Module, TokenCounts
from dop_search.strategy.policy import GroupPolicy
from dop_search.utils.errors import StrategyError

Depths = tuple[int, int, int]
"""Exit depths of queries, of keys and values, and of the MLP."""


@dataclass(frozen=True)
class TextGroups:
    """What two groups of text tokens do.

    Attributes:
        before: the prompt before its first visual token.
        after: the prompt after it, but its last token.
    """

    num_layers: int
    before: GroupPolicy
    after: GroupPolicy

    def __post_init__(self) -> None:
        for policy in self.policies:
            for module in Module:
                depth = policy.depth(module)
                if depth is None:
                    raise StrategyError(f"text tokens leave at exit depths, but got the layers {policy.layers(module)}")
                if not 0 <= depth <= self.num_layers:
                    raise StrategyError(f"`0 <= depth <= {self.num_layers}` must hold for text tokens, but got {depth}")

    @classmethod
    def depthwise(cls, num_layers: int, before: Depths, after: Depths) -> TextGroups:
        """Modules run in the layers below their exit depths.

        Raises:
            StrategyError: if a depth is outside ``0..num_layers``.
        """
        policies = [GroupPolicy(tuple(range(q)), tuple(range(kv)), tuple(range(mlp))) for q, kv, mlp in (before, after)]
        return cls(num_layers, *policies)

    @property
    def policies(self) -> tuple[GroupPolicy, GroupPolicy]:
        """Both, in the order of their numbers."""
        return self.before, self.after

    def assign(self, groups: np.ndarray, visual: np.ndarray, first: int) -> np.ndarray:
        """Number the text tokens of one sample.

        Args:
            groups: ``[num_tokens]``, see :func:`dop_search.pruning.layout.assign_groups`.
            visual: ``[num_tokens]`` boolean.
            first: number of the first text group.

        Returns:
            The groups, with ``first`` and ``first + 1`` in place of ``TEXT`` for these tokens.
        """
        if not visual.any():
            return groups
        place, image = np.arange(len(groups)), int(np.argmax(visual))
        text = groups == TEXT
        groups = np.where(text & (place < image), first, groups)
        return np.where(text & (place > image) & (place < len(groups) - 1), first + 1, groups)


def text_sizes(visual: np.ndarray) -> tuple[int, int]:
    """Tokens of the groups ``before`` and ``after`` in a prompt with visual tokens at ``visual`` (``[num_tokens]``).

    None of either in a prompt of text alone. The last token is in neither, whether it is text or visual.
    """
    if not visual.any():
        return 0, 0
    image = int(np.argmax(visual))
    return image, len(visual) - image - TokenCounts.of_prompt(visual).visual - 1 if image < len(visual) - 1 else 0


def text_groups_flops(
    dims: ModelDims, strategy: Strategy, text: TextGroups, num_visual: int, sizes: Sequence[int]
) -> int:
    """FLOPs of one sample's prefill, as :func:`dop_search.strategy.cost.flops.strategy_flops` counts them.

    Args:
        strategy: of the visual tokens.
        text: of the text tokens.
        sizes: see :func:`text_sizes`; with them goes one token that runs everything.
    """
    counts = layer_counts(strategy, TokenCounts(1, num_visual))
    for policy, size in zip(text.policies, sizes, strict=True):
        counts = counts.plus(policy.canonical(), size)
    return total_flops(dims, counts)
