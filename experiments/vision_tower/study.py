"""The vision tower's attention and MLPs with exit depths of their own; FLOPs are the tower's and the decoder's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Annotated

from pydantic import Field
from transformers import PreTrainedModel

from dop_search.app.workbench import Workbench
from dop_search.baselines import FitContext
from dop_search.models.capture import TowerView
from dop_search.models.tower_depth import tower_depth_flops, tower_depths
from dop_search.pruning import pruned
from dop_search.strategy import Strategy
from dop_search.strategy.cost.model import CostModel
from dop_search.utils.errors import UnsupportedModelError
from experiments.text_operations.extension import Depths, Extension, ExtensionStudy


class VisionTower(Extension):
    """The tower with two exit depths.

    Args:
        view: the tower; every image is one run of it, every patch one visual token.
        context: gives what prices the decoder on the search samples; asked when something is to be counted.

    Raises:
        UnsupportedModelError: if a visual token is not one patch of the only run of the tower.
    """

    def __init__(self, view: TowerView, context: Callable[[], FitContext]) -> None:
        if view.grid is None:
            raise UnsupportedModelError(
                "the study of the vision tower needs a model whose visual tokens are the patches of one image "
                "(LLaVA-1.5, pocket); any-resolution tiles are not counted"
            )
        self.view, self._context = view, context
        self.patches = view.grid[0] * view.grid[1]
        self.full: Mapping[str, int] = {"attention": len(view.layers), "mlp": len(view.layers)}

    @cached_property
    def _cost(self) -> CostModel:
        return self._context().pricing.cost_model

    @cached_property
    def _total(self) -> int:
        return self._cost.full_total + self._tower(self.full)

    @cached_property
    def _images(self) -> int:
        return sum(counts.visual // self.patches for counts in self._context().counts)

    def _tower(self, depths: Depths) -> int:
        return self._images * tower_depth_flops(self.view, depths["attention"], depths["mlp"], self.patches)

    def ratio(self, strategy: Strategy, depths: Depths) -> float:
        """See base class: tower and decoder together."""
        return (self._cost.total(strategy) + self._tower(depths)) / self._total

    def decoder_ratio(self, ratio: float) -> float:
        """See base class."""
        return ratio * self._total / self._cost.full_total

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
        return VisionTower(bench.loaded.adapter.tower_view, bench.context)
