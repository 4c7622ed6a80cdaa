"""What a selector's choice for one sample does to the decoder's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.models.capture import TOWER_FIELDS, field_and_layer
from dop_search.selectors import Selection, Selector, SelectorInputs
from dop_search.selectors.base import TowerPatch
from dop_search.utils.errors import DopError, UnsupportedModelError

MAX_REMEMBERED = 8
PREFIX = "selector."
NO_SLOTS = np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Choice:
    """One sample's visual tokens for one number of kept ones.

    Attributes:
        order: visual tokens, best first.
        slots: visual tokens whose embeddings are replaced; all of them are kept.
        embeds: ``[len(slots), hidden_size]`` what the decoder receives there instead.
        images: visual tokens of each image, if the choice was made for each of them.
    """

    order: np.ndarray
    slots: np.ndarray = field(default_factory=lambda: NO_SLOTS)
    embeds: Tensor | None = None
    images: tuple[int, ...] = ()


def as_choice(adapter: ModelAdapter, selection: Selection, dtype: torch.dtype) -> Choice:
    """Bring merged features into the decoder's input space.

    Features of the projector's input go through the model's own projector, token by token, which is the same as merging
    in front of it.
    """
    if selection.features is None or len(selection.slots) == 0:
        return Choice(selection.order)
    embeds = selection.features.to(dtype)
    if selection.space == "features":
        project = adapter.tower_view.project
        assert project is not None  # checked when the selector met the model
        embeds = project(embeds)
    return Choice(selection.order, selection.slots, embeds)


@dataclass
class Chooser:
    """Chooses again for every number of kept tokens, for selectors whose choice is not the head of one ranking.

    Attributes:
        inputs: what the criterion sees of one sample, but for ``embeds``, which the sample itself holds.
    """

    adapter: ModelAdapter
    selector: Selector
    inputs: SelectorInputs
    _memo: dict[int, Choice] = field(default_factory=dict, repr=False)

    @property
    def tensors(self) -> list[Tensor]:
        """What it keeps of the sample."""
        return [*self.inputs.tensors.values()]

    def to_host(self) -> Chooser:
        """The same with what it keeps in host memory; it computes on the decoder's device all the same."""
        return replace(self, inputs=self.inputs.to(torch.device("cpu")))

    @torch.inference_mode()
    def __call__(self, num_kept: int, embeds: Callable[[], Tensor]) -> Choice:
        """The choice for ``num_kept`` tokens; ``embeds`` gives the visual tokens as the decoder receives them."""
        if num_kept not in self._memo:
            while len(self._memo) >= MAX_REMEMBERED:
                self._memo.pop(next(iter(self._memo)))
            choice = self._choose(replace(self.inputs, embeds=embeds()).to(self.adapter.device), num_kept)
            self._memo[num_kept] = choice if choice.embeds is None else replace(choice, embeds=choice.embeds.cpu())
        return self._memo[num_kept]

    def _choose(self, inputs: SelectorInputs, num_kept: int) -> Choice:
        if self.selector.changes_tower:
            return self._through_tower(inputs, num_kept)
        return as_choice(self.adapter, self.selector.select(inputs, num_kept), inputs.tensor("embeds").dtype)

    def _through_tower(self, inputs: SelectorInputs, num_kept: int) -> Choice:
        patch = None
        if 0 < num_kept < inputs.num_visual_tokens:
            images = check_images(self.adapter, self.selector, inputs.num_visual_tokens, inputs)
            patch = patch_tower(self.adapter, self.selector, num_kept)
        if patch is None:
            return Choice(self.selector.rank(inputs, num_kept))
        patch.run.images = (images,)
        watch = self.adapter.vision_watch.open()
        try:
            embeds = self.adapter.encode_images(inputs.tensor("pixel_values"), inputs.image_sizes)
            noticed = {name: self.adapter.to_token_order(values)[:, 0] for name, values in patch.run.values.items()}
        finally:
            watch.remove()
            patch.restore()
        order = self.selector.rank(inputs.with_tensors(noticed), num_kept)
        slots = order[:num_kept]
        return Choice(order, slots, embeds[torch.from_numpy(slots).to(embeds.device)])


def patch_tower(adapter: ModelAdapter, selector: Selector, num_kept: int | None) -> TowerPatch | None:
    """Make the tower compute for ``num_kept`` tokens per sample; ``None`` if that is all of them or none.
    UnsupportedModelError if it cannot change this tower."""
    grid = selector.tower_grid(adapter)
    if not num_kept or (grid is not None and num_kept >= grid[0] * grid[1] and not selector.several_images):
        return None
    return selector.patch_tower(adapter, num_kept)


def check_images(
    adapter: ModelAdapter, selector: Selector, num_visual: int, inputs: SelectorInputs | None = None
) -> int:
    """How many images a sample has under a selector that changes the tower; DopError if there are several and it works
    on one.

    Where images may have any size, ``inputs`` tell whether there are several, once they are there.
    """
    if (grid := selector.tower_grid(adapter)) is not None:
        number, several = num_visual // (grid[0] * grid[1]), num_visual != grid[0] * grid[1]
        what = f"one image per sample ({grid[0] * grid[1]} visual tokens)"
    else:
        number, several, what = 1, inputs is not None and _has_several_images(inputs), "one image per sample, no video"
    if several and not selector.several_images:
        raise DopError(
            f"{selector.name!r} changes the vision tower and needs {what}, but a sample has {num_visual} visual tokens"
        )
    return number


def _has_several_images(inputs: SelectorInputs) -> bool:
    return len(inputs.image_grids) > 1 if inputs.tiles is None else inputs.tile_grid is None


def of_the_tower(adapter: ModelAdapter, needs: frozenset[str]) -> frozenset[str]:
    """The fields that the vision tower shows."""
    return frozenset(name for name in needs if field_and_layer(name)[0] in TOWER_FIELDS) - adapter.input_fields


def check_model(adapter: ModelAdapter, selector: Selector) -> None:
    """Refuse a selector whose result would not be what it says on this family; UnsupportedModelError naming selectors
    that work."""
    seen = of_the_tower(adapter, selector.needs())
    if not adapter.has_tower and (seen or selector.merges or selector.changes_tower):
        raise UnsupportedModelError(
            f"{selector.name!r} works on images, but {type(adapter.model).__name__} reads text alone; use selector="
            "received_attention, divprune, divprune_lazy, cdpruner_llm, uniform_grid or random"
        )
    if "tile_grid" in selector.needs():
        _ = adapter.tower_view  # or an error: of these families it is known whether and how images are cut
    if selector.merges and adapter.has_deepstack:
        raise UnsupportedModelError(
            f"{selector.name!r} merges tokens at the decoder's input, but {type(adapter.model).__name__} adds vision "
            "features after its first layers as well, which would stay unmerged; use selector=divprune, "
            "cdpruner_llm, received_attention, uniform_grid or random"
        )
    if selector.merges and "features" in selector.needs() and adapter.tower_view.project is None:
        raise UnsupportedModelError(
            f"{selector.name!r} merges patches in front of the projector, but visual tokens of "
            f"{type(adapter.model).__name__} are not projections of single patches (newlines, resized tiles); "
            "selectors that merge after the projector are avg_pool and trim_llm"
        )


def inputs_to_file(inputs: SelectorInputs) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file keeps of selector inputs: tensors by name, and JSON-ready facts. ``embeds`` are left out."""
    kept = {name: value for name, value in inputs.tensors.items() if name != "embeds"}
    facts = {
        item.name: value
        for item in fields(inputs)
        if (value := getattr(inputs, item.name)) is not None and not isinstance(value, Tensor)
    }
    tensors = {f"{PREFIX}{name}": value.contiguous().clone() for name, value in kept.items()}
    return tensors, facts | {"layers": sorted(inputs.layers)}


def inputs_from_file(facts: dict[str, Any], get_tensor: Callable[[str], Tensor | None]) -> SelectorInputs:
    """Inverse of :func:`inputs_to_file`.

    ``get_tensor``: the tensor of a name, ``None`` where the file has none.
    """
    names = [*(item.name for item in fields(SelectorInputs)), *facts.get("layers", ())]
    tensors = {name: tensor for name in names if (tensor := get_tensor(f"{PREFIX}{name}")) is not None}
    grids = tuple((int(rows), int(columns)) for rows, columns in facts["image_grids"])
    tile_grid = None if facts.get("tile_grid") is None else tuple(facts["tile_grid"])
    plain = {**facts, "image_grids": grids, "tile_grid": tile_grid, "layers": {}}
    return SelectorInputs(**plain).with_tensors(tensors)
