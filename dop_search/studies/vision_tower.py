"""The vision tower's attention and MLPs with exit depths of their own; FLOPs are the tower's and the decoder's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from transformers import PreTrainedModel

from dop_search.app.results import ResultFile
from dop_search.app.workbench import Workbench
from dop_search.baselines import FitContext
from dop_search.models.capture import TowerView
from dop_search.models.tower_depth import tower_depth_flops, tower_depths
from dop_search.pruning import pruned
from dop_search.strategy import Strategy
from dop_search.studies.extension import Depths, Extension, checked_levels, extension_study
from dop_search.utils.errors import UnsupportedModelError


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


def vision_tower(bench: Workbench, results: ResultFile, num_levels: int = 6, num_candidates: int = 12) -> None:
    """Search the tower's exit depths with the visual tokens'; see :mod:`dop_search.studies.extension`.

    The selector must not look into the tower's attention, which may not run: DivPrune, random, a grid.

    Args:
        bench: the model and its samples.
        results: where the rows go.
        num_levels: depths per parameter.
        num_candidates: that exact KL chooses among.
    """
    extension = VisionTower(bench.loaded.adapter.tower_view, bench.context())
    extension_study(bench, results, extension, checked_levels(extension.full, num_levels), num_candidates)
