"""Text tokens as further groups: what do their operations cost in KL, and what do they free for the visual tokens?"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any

from transformers import PreTrainedModel

from dop_search.app.workbench import Workbench
from dop_search.divergence import Teacher
from dop_search.pruning import pruned
from dop_search.pruning.text_groups import TextGroups, text_groups_flops, text_sizes
from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import full_flops
from dop_search.strategy.operations import MODULES, ModelDims, TokenCounts
from experiments.text_operations.extension import Depths, Extension, ExtensionStudy

GROUPS = ("before", "after")


class TextOperations(Extension):
    """The prompt before its image, and after it but its last token, each with three exit depths.

    Args:
        dims: sizes of the decoder.
        teacher: gives the one whose prompts FLOPs are counted on; asked when something is to be counted.
    """

    def __init__(self, dims: ModelDims, teacher: Callable[[], Teacher]) -> None:
        self.dims, self._teacher = dims, teacher
        self.full: Mapping[str, int] = {f"{group}_{m.value}": dims.num_layers for group in GROUPS for m in MODULES}

    @cached_property
    def _prompts(self) -> Counter[tuple[int, tuple[int, int]]]:
        """How many prompts have so many visual tokens, and text tokens before and after them."""
        masks = [s.encoded.visual[: s.encoded.prompt_length].cpu().numpy() for s in self._teacher().samples]
        return Counter((TokenCounts.of_prompt(visual).visual, text_sizes(visual)) for visual in masks)

    @cached_property
    def _full_flops(self) -> int:
        return sum(
            weight * full_flops(self.dims, TokenCounts(sum(sizes) + 1, visual))
            for (visual, sizes), weight in self._prompts.items()
        )

    def groups(self, depths: Depths) -> TextGroups:
        """The depths as the runtime takes them."""
        before, after = (tuple(depths[f"{group}_{m.value}"] for m in MODULES) for group in GROUPS)
        return TextGroups.depthwise(self.dims.num_layers, before, after)  # type: ignore[arg-type]

    def ratio(self, strategy: Strategy, depths: Depths) -> float:
        """See base class; dead operations of text in the last layer are left out of every strategy alike."""
        text = self.groups(depths)
        total = sum(
            weight * text_groups_flops(self.dims, strategy, text, visual, sizes)
            for (visual, sizes), weight in self._prompts.items()
        )
        return total / self._full_flops

    def decoder_ratio(self, ratio: float) -> float:
        """See base class."""
        return ratio

    def apply(self, model: PreTrainedModel, strategy: Strategy, depths: Depths) -> AbstractContextManager[Any]:
        """See base class."""
        return pruned(model, strategy, text=self.groups(depths))

    def is_sensible(self, depths: Depths) -> bool:
        """States are read until the token is last a key: no query or MLP after that, nor in the last layer.

        The last one before that is dead as well, but the levels are coarse.
        """
        full = self.dims.num_layers
        for group in GROUPS:
            q, kv, mlp = (depths[f"{group}_{m.value}"] for m in MODULES)
            if (q, kv, mlp) != (full, full, full) and max(q, mlp) > min(kv, full - 1):
                return False
        return True


class TextOperationsStudy(ExtensionStudy):
    """Search exit depths of text tokens with those of the visual tokens; see ``extension.py``."""

    question = "What do text tokens' operations cost in KL, and what does skipping some free for the visual tokens?"

    def make_extension(self, bench: Workbench) -> TextOperations:
        """See base class."""
        return TextOperations(bench.loaded.adapter.dims, lambda: bench.teacher("search"))
