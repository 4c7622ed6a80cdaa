"""The vision tower's attention and MLPs with exit depths of their own; FLOPs are the tower's and the decoder's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Annotated

from pydantic import Field
from transformers import PreTrainedModel

from dop_search.app.workbench import Workbench
from dop_search.baselines import FitContext
from dop_search.models.capture import TowerView
from dop_search.models.tower_depth import tower_depth_flops, tower_depths
from dop_search.pruning import pruned
from dop_search.strategy import Strategy
from dop_search.utils.errors import UnsupportedModelError
from experiments.text_operations.extension import Depths, Extension, ExtensionStudy


class VisionTower(Extension):
    """The tower with two exit depths.

    Args:
        view: the tower; every image is one run of it, every patch one visual token.
        context: prices the decoder on the search samples.

    Raises:
        UnsupportedModelError: if a visual token is not one patch of the only run of the tower.
    """

    def __init__(self, view: TowerView, context: FitContext) -> None:
        if view.grid is None:
            raise UnsupportedModelError(
                "the study of the vision tower needs a model whose visual tokens are the patches of one image "
                "(LLaVA-1.5, pocket); any-resolution tiles are not counted"
            )
        self.view, self.cost = view, context.pricing.cost_model
        self.patches = view.grid[0] * view.grid[1]
        self.full: Mapping[str, int] = {"attention": len(view.layers), "mlp": len(view.layers)}
        self._decoder = self.cost.full_total
        self._images = sum(counts.visual // self.patches for counts in context.counts)
        self._total = self._decoder + self._tower(self.full)

    def _tower(self, depths: Depths) -> int:
        return self._images * tower_depth_flops(self.view, depths["attention"], depths["mlp"], self.patches)

    def ratio(self, strategy: Strategy, depths: Depths) -> float:
        """See base class: tower and decoder together."""
        return (self.cost.total(strategy) + self._tower(depths)) / self._total

    def decoder_ratio(self, ratio: float) -> float:
        """See base class."""
        return ratio * self._total / self._decoder

    @contextmanager
    def apply(self, model: PreTrainedModel, strategy: Strategy, depths: Depths) -> Iterator[None]:
        """See base class."""
        with tower_depths(self.view, depths["attention"], depths["mlp"]), pruned(model, strategy):
            yield


class VisionTowerStudy(ExtensionStudy):
    """Search the tower's exit depths with the visual tokens'; see ``text_operations/extension.py``.

    The selector must not look into the tower's attention, which may not run: DivPrune, random, a grid.
    """

    question = "What do the vision tower's own operations cost in KL, and what does skipping some free for the decoder?"

    num_levels: Annotated[int, Field(ge=2)] = 6
    """Depths per parameter at which its curve is measured, evenly from 0 to the full one, and the one below that."""

    def make_extension(self, bench: Workbench) -> VisionTower:
        """See base class."""
        return VisionTower(bench.loaded.adapter.tower_view, bench.context())
