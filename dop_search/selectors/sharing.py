"""Methods that are defined on one image, applied to several images or tiles: each gets its share of the tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from dop_search.selectors.base import Selection, Selector, SelectorInputs, kept_count

Ranked = tuple[np.ndarray, np.ndarray]
"""Tokens, and how far down their image's order each one stands."""

OneImage = Callable[[SelectorInputs, int], Selection]

Grid = tuple[int, int]
Grids = tuple[Grid, ...]


def shares(weights: np.ndarray, capacities: np.ndarray, total: int) -> np.ndarray:
    """Cut ``total`` tokens by weight, at most ``capacities`` each; largest remainders first, ties by index.

    What a full part cannot take goes to the others by the same rule.
    """
    result = np.zeros(len(weights), dtype=np.int64)
    weights = np.asarray(weights, dtype=np.float64)
    while (left := min(total, int(capacities.sum())) - int(result.sum())) > 0:
        open_ = result < capacities
        part = np.where(open_, weights, 0.0)
        part = np.where(open_, 1.0, 0.0) if part.sum() <= 0 else part
        ideal = left * part / part.sum()
        whole = np.floor(ideal + 1e-9).astype(np.int64)
        for index in np.argsort(-(ideal - whole), kind="stable")[: left - int(whole.sum())]:
            whole[index] += 1
        result = np.minimum(result + whole, capacities)
    return result


def image_slices(inputs: SelectorInputs) -> Iterator[slice]:
    """The tokens of each image."""
    start = 0
    for rows, columns in inputs.image_grids:
        yield slice(start, start + rows * columns)
        start += rows * columns


def each_image(inputs: SelectorInputs, images: Sequence[Grids], tile_grids: Sequence[Grid]) -> list[SelectorInputs]:
    """What a criterion would see of each image of a sample if it were alone with the sample's text.

    Args:
        images: the grids of each image, which together are ``inputs.image_grids``.
        tile_grids: where images are cut into tiles, rows and columns of each one's crops.
    """
    parts, start = [], 0
    for index, grids in enumerate(images):
        tokens = np.arange(start, start + sum(rows * columns for rows, columns in grids))
        part, start = _one_part(inputs, tokens, grids), start + len(tokens)
        if inputs.tiles is not None:
            tiles = inputs.tiles[tokens[0] : start]
            tiles = torch.where(tiles < 0, tiles, tiles - tiles[tiles >= 0].min())
            part = replace(part, tiles=tiles, tile_grid=tile_grids[index])
        parts.append(part)
    return parts


def select_each(selector: Selector, images: Sequence[SelectorInputs], num_kept: Callable[[int], int]) -> Selection:
    """The choices of all images, one image after the other: the order says nothing across images.

    ``num_kept``: from an image's tokens to those kept.
    """
    choices, start = [], 0
    for image in images:
        tokens = np.arange(start, start := start + image.num_visual_tokens)
        choices.append((tokens, selector.select(image, num_kept(image.num_visual_tokens))))
    return _joined(np.concatenate([tokens[found.order] for tokens, found in choices]), choices)


def _joined(order: np.ndarray, choices: Sequence[tuple[np.ndarray, Selection]]) -> Selection:
    """The choices among some tokens each, in this order."""
    merged = [
        (tokens[found.slots], found.features, found.space) for tokens, found in choices if found.features is not None
    ]
    if not merged:
        return Selection(order)
    slots, features, spaces = zip(*merged, strict=True)
    return Selection(order, np.concatenate(slots), torch.cat(features), spaces[-1])


Part = tuple[np.ndarray, tuple[int, int]]
"""Tokens that a method chooses among, in their order, and the grid they stand in."""


def parts_of(inputs: SelectorInputs, join_crops: bool = False) -> list[Part]:
    """Each image of a sample; of images that are cut into tiles each tile, or of one image all crops together."""
    if inputs.tiles is None:
        everything = np.arange(inputs.num_visual_tokens)
        return [(everything[part], grid) for part, grid in zip(image_slices(inputs), inputs.image_grids, strict=True)]
    columns = np.concatenate([np.tile(np.arange(c), r) for r, c in inputs.image_grids])
    tiles = inputs.tiles.cpu().numpy()
    if join_crops and inputs.tile_grid:
        tiles = np.minimum(tiles, 1)
    parts: list[Part] = []
    for tile in range(tiles.max(initial=-1) + 1):
        tokens = np.flatnonzero(tiles == tile)
        if len(tokens):
            width = len(np.unique(columns[tokens]))
            parts.append((tokens, (len(tokens) // width, width)))
    return parts


def per_image(inputs: SelectorInputs, num_kept: int | None, choose: OneImage) -> Selection:
    """Run a method on every image, or on every tile of it, and join the choices.

    The kept tokens are cut by the parts' sizes. In the joint order the parts take turns by relative rank, kept tokens
    before all others; newline tokens of tiled images come last.
    """
    total = kept_count(inputs, num_kept)
    parts = parts_of(inputs)
    if len(parts) == 1 and inputs.tiles is None:
        return choose(inputs, total)
    sizes = np.array([len(tokens) for tokens, _ in parts])
    counts = shares(sizes, sizes, total)
    heads: list[Ranked] = []
    tails: list[Ranked] = []
    choices = []
    for (tokens, grid), count in zip(parts, counts, strict=True):
        found = choose(_one_part(inputs, tokens, (grid,)), int(count))
        heads.append(_ranked(tokens, found.order[:count]))
        tails.append(_ranked(tokens, found.order[count:]))
        choices.append((tokens, found))
    return _joined(np.concatenate([_take_turns(heads), _take_turns(tails), _newlines(inputs)[0]]), choices)


def in_turns(
    inputs: SelectorInputs, rank_one: Callable[[np.ndarray, tuple[int, int]], np.ndarray], join_crops: bool = False
) -> np.ndarray:
    """Rank every image, or every tile of it, by itself; they take turns by relative rank, so that the order is nested.

    ``rank_one``: from the tokens of a part and its grid to their order, counted from 0. Newline tokens of tiled images
    come last.
    """
    orders = [_ranked(tokens, rank_one(tokens, grid)) for tokens, grid in parts_of(inputs, join_crops)]
    return _take_turns([*orders, _newlines(inputs)])


def share_of(tokens: np.ndarray, inputs: SelectorInputs, num_kept: int) -> int:
    """How many of a part's tokens :func:`in_turns` can put among the first ``num_kept``, at most."""
    num_patches = inputs.num_visual_tokens - len(_newlines(inputs)[0])
    return min(len(tokens), -(-num_kept * len(tokens) // max(1, num_patches)) + 1)


def _ranked(tokens: np.ndarray, order: np.ndarray) -> Ranked:
    return tokens[order], np.arange(len(order)) / max(1, len(order))


def _newlines(inputs: SelectorInputs) -> Ranked:
    """Tokens of no tile, behind all others."""
    tokens = np.empty(0, dtype=np.int64) if inputs.tiles is None else np.flatnonzero(inputs.tiles.cpu().numpy() < 0)
    return tokens, np.ones(len(tokens))


def _take_turns(parts: list[Ranked]) -> np.ndarray:
    progress = np.concatenate([turn for _, turn in parts])
    return np.concatenate([order for order, _ in parts])[np.argsort(progress, kind="stable")].astype(np.int64)


def _one_part(inputs: SelectorInputs, tokens: np.ndarray, grids: Grids) -> SelectorInputs:
    """The inputs of one image or tile; text is shared, per-token tensors are cut."""
    whole = {"text_embeds", "pixel_values", "image_sizes"}
    cut = {
        name: value[torch.from_numpy(tokens).to(value.device)]
        for name, value in inputs.tensors.items()
        if name not in whole
    }
    return replace(inputs.with_tensors(cut), num_visual_tokens=len(tokens), image_grids=grids, tiles=None)


@dataclass(frozen=True)
class PerImageSelector(Selector):
    """A method that is defined on one image, for a given number of kept tokens; :meth:`one_image` is all it says.

    Where images are cut into tiles it runs on every tile, as the papers do on LLaVA-NeXT.
    """

    nested = False

    def needs(self) -> frozenset[str]:
        return self.requires | {"tiles"}

    @abstractmethod
    def one_image(self, inputs: SelectorInputs, num_kept: int) -> Selection:
        """The choice for an image of its own."""

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        return self.select(inputs, num_kept).order

    def select(self, inputs: SelectorInputs, num_kept: int | None = None) -> Selection:
        return per_image(inputs, num_kept, self.one_image)
