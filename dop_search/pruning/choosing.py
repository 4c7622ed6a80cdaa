"""What a selector's choice for one sample does to the decoder's input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dop_search.models.adapter import ModelAdapter
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
    """

    order: np.ndarray
    slots: np.ndarray = field(default_factory=lambda: NO_SLOTS)
    embeds: Tensor | None = None


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
        adapter: the model.
        selector: the criterion.
        inputs: what the criterion sees of one sample, but for ``embeds``, which the sample itself holds.
    """

    adapter: ModelAdapter
    selector: Selector
    inputs: SelectorInputs
    _memo: dict[int, Choice] = field(default_factory=dict, repr=False)

    @property
    def tensors(self) -> list[Tensor]:
        """What it keeps of the sample."""
        return [value for value in vars(self.inputs).values() if isinstance(value, Tensor)]

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
            images = check_images(self.adapter, self.selector, inputs.num_visual_tokens)
            patch = patch_tower(self.adapter, self.selector, num_kept)
        if patch is None:
            return Choice(self.selector.rank(inputs, num_kept))
        patch.run.images = (images,)
        try:
            embeds = self.adapter.encode_images(inputs.tensor("pixel_values"))
        finally:
            patch.restore()
        noticed: dict[str, Any] = {name: values.reshape(-1) for name, values in patch.run.values.items()}
        order = self.selector.rank(replace(inputs, **noticed), num_kept)
        slots = order[:num_kept]
        return Choice(order, slots, embeds[torch.from_numpy(slots).to(embeds.device)])


def patch_tower(adapter: ModelAdapter, selector: Selector, num_kept: int | None) -> TowerPatch | None:
    """Make the tower compute for ``num_kept`` tokens per sample; ``None`` if that is all of them or none.

    Raises:
        UnsupportedModelError: if the model's images do not all have the same number of tokens.
    """
    tower = adapter.tower_view
    if tower.grid is None:
        raise UnsupportedModelError(
            f"{selector.name!r} changes what the vision tower computes and needs images of one size, but "
            f"{type(adapter.model).__name__} takes any; use avg_pool or another selector, "
            "or the method `resize`, which has the processor make smaller images"
        )
    if not num_kept or (num_kept >= tower.grid[0] * tower.grid[1] and not selector.several_images):
        return None
    return selector.patch_tower(tower, num_kept, tower.grid)


def check_images(adapter: ModelAdapter, selector: Selector, num_visual: int) -> int:
    """How many images a sample has under a selector that changes the tower.

    Raises:
        DopError: if there are several and it works on one.
    """
    rows, columns = adapter.tower_view.grid or (1, 1)
    if num_visual != rows * columns and not selector.several_images:
        raise DopError(
            f"{selector.name!r} changes the vision tower and needs one image per sample "
            f"({rows * columns} visual tokens), but a sample has {num_visual}"
        )
    return num_visual // (rows * columns)


def inputs_to_file(inputs: SelectorInputs) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What a file keeps of selector inputs: tensors by name, and JSON-ready facts. ``embeds`` are left out."""
    tensors, facts = {}, {}
    for item in fields(inputs):
        value = getattr(inputs, item.name)
        if isinstance(value, Tensor):
            if item.name != "embeds":
                tensors[f"{PREFIX}{item.name}"] = value.contiguous().clone()
        elif value is not None:
            facts[item.name] = value
    return tensors, facts


def inputs_from_file(facts: dict[str, Any], get_tensor: Callable[[str], Tensor | None]) -> SelectorInputs:
    """Inverse of :func:`inputs_to_file`.

    Args:
        facts: the JSON-ready facts.
        get_tensor: the tensor of a name, ``None`` where the file has none.
    """
    tensors = {item.name: get_tensor(f"{PREFIX}{item.name}") for item in fields(SelectorInputs)}
    present: dict[str, Any] = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    grids = tuple((int(rows), int(columns)) for rows, columns in facts["image_grids"])
    tile_grid = None if facts.get("tile_grid") is None else tuple(facts["tile_grid"])
    return SelectorInputs(**{**facts, **present, "image_grids": grids, "tile_grid": tile_grid})
