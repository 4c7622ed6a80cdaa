"""HiRED: a token budget per crop of an any-resolution image, then CLS attention within each."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from dop_search.selectors.attention_choice import AttentionSelector
from dop_search.selectors.base import SelectionSizes, SelectorInputs, at_layer, check_options, descending, kept_count
from dop_search.selectors.sharing import shares
from dop_search.utils.errors import DopError


@dataclass(frozen=True)
class HiredSelector(AttentionSelector):
    """HiRED (arXiv 2408.10945).

    Of ``T`` tokens the whole image gets ``⌊full_share · T⌋``. Of its ``n`` positions the ``⌊(1 − full_share) · n⌋``
    with the highest CLS attention in the tower's *first* layer are counted per crop, and the crops share the rest of
    the tokens in proportion (largest remainders). Within the whole image and within each crop the tokens with the
    highest CLS attention in the layer that feeds the projector (layer 22 of CLIP ViT-L, as in the paper) are kept.
    Newline tokens are not.

    An image without crops (LLaVA-1.5), or several images in a sample, make this plain ``cls_attention`` or
    ``received_attention``.

    Options:
        full_share: share of the budget for the whole image.
        attention: see :class:`AttentionSelector`; the paper's towers have a CLS token, OneVision's has none.

    Not reproduced: the released code rounds the crops' tokens down and loses the rest; it counts horizontal strips of
    the whole image instead of the crops' regions wherever there is more than one column of crops, which is a fault.
    Crops are counted without regard to the padding of the image's aspect ratio, as released. Renumbered positions.
    """

    full_share: float = 0.5

    name = "hired"
    version = 3
    requires = frozenset({"tiles", "tile_grid"})
    nested = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_options(0.0 <= self.full_share <= 1.0, "`0 <= full_share <= 1`", full_share=self.full_share)

    def needs(self) -> frozenset[str]:
        return self.requires | {f"{self.attention}_attention", self._first}

    @property
    def _first(self) -> str:
        return at_layer(f"{self.attention}_attention", 0)

    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        by_attention = descending(self.scores(inputs))
        if inputs.tiles is None:
            return by_attention
        tiles = inputs.tiles.cpu().numpy().astype(np.int64)
        if not inputs.tile_grid or not all(inputs.tile_grid):  # several images, or one without crops
            is_patch = tiles[by_attention] >= 0
            return np.concatenate([by_attention[is_patch], by_attention[~is_patch]])
        sizes = np.bincount(tiles[tiles >= 0], minlength=1 + inputs.tile_grid[0] * inputs.tile_grid[1])
        total = min(kept_count(inputs, num_kept), int(sizes.sum()))
        budgets = self._budgets(inputs, tiles, sizes, total)
        kept = np.zeros(len(tiles), dtype=np.bool_)
        for tile, budget in enumerate(budgets):
            kept[by_attention[tiles[by_attention] == tile][:budget]] = True
        is_kept, is_patch = kept[by_attention], tiles[by_attention] >= 0
        return np.concatenate(
            [by_attention[is_kept], by_attention[~is_kept & is_patch], by_attention[~is_kept & ~is_patch]]
        )

    def _budgets(self, inputs: SelectorInputs, tiles: np.ndarray, sizes: np.ndarray, total: int) -> np.ndarray:
        assert inputs.tile_grid is not None
        whole = min(int(self.full_share * total), int(sizes[0]))
        crops = self._crop_counts(inputs, tiles, inputs.tile_grid)
        budgets = np.concatenate([[whole], shares(crops.astype(np.float64), sizes[1:], total - whole)])
        budgets[0] += total - budgets.sum()  # what the crops cannot take
        return budgets

    def _crop_counts(self, inputs: SelectorInputs, tiles: np.ndarray, tile_grid: tuple[int, int]) -> np.ndarray:
        """How many of the best positions of the whole image lie in each crop's region."""
        whole = np.flatnonzero(tiles == 0)
        side = int(len(whole) ** 0.5 + 0.5)
        if side * side != len(whole):
            raise DopError(f"hired needs a square whole image, but its tile has {len(whole)} tokens")
        scores = inputs.tensor(self._first)[inputs.tensor("tiles") == 0]
        row, column = np.divmod(descending(scores)[: int(len(whole) * (1.0 - self.full_share))], side)
        crop = row * tile_grid[0] // side * tile_grid[1] + column * tile_grid[1] // side
        return np.bincount(crop, minlength=tile_grid[0] * tile_grid[1])

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """The attention of two layers."""
        return 2 * self.attention_flops(sizes)
