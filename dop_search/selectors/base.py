"""Which visual tokens come first: the extension point of every selection criterion."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from dop_search.strategy.operations import ModelDims
from dop_search.utils.attached import Attached, replace_attribute
from dop_search.utils.errors import DopError, UnsupportedModelError

if TYPE_CHECKING:
    from dop_search.models.adapter import ModelAdapter


@dataclass(frozen=True)
class SelectorInputs:
    """What a criterion may look at, for one sample. Only what :meth:`Selector.needs` names is there.

    ``n`` is the number of visual tokens; every per-token tensor is in the order of the visual tokens. "The layer that
    feeds the projector" is the tower's layer whose output the projector receives (``vision_feature_layer``).

    Attributes:
        num_visual_tokens: tokens to rank.
        image_grids: rows and columns of consecutive pieces of tokens: images, and what any-resolution models cut them
            into; newline tokens are a column of their grid, or a ``(1, 1)`` grid.
        cls_attention: ``[n]`` head-mean attention of the CLS token in the layer that feeds the projector.
        received_attention: ``[n]`` attention that a token receives there (or in the last layer that attends to whole
            images), mean over heads and over the patches that ask.
        global_attention: ``[n]`` as ``received_attention``, with the CLS token among those that ask.
        layers: each of these three in other layers of the tower, as :func:`at_layer` names them: ``cls_attention@5``.
        last_cls_attention: ``[n]`` CLS attention of the tower's last layer, as one head over the full width.
        keys: ``[n, head_dim]`` head-mean keys of the layer of ``received_attention``, rotated as the tower does.
        last_keys: ``[n, width]`` keys of the tower's last layer, all heads side by side.
        features: ``[n, width]`` what the projector receives.
        cls_feature: ``[n, width]`` what the projector would receive for the CLS token of the token's image.
        patch_states: ``[n, width]`` what the projector receives after the tower's final norm, as CLIP's own head would
            see it.
        tower_sizes: ``[n]`` patches that a token stands for after merging in the tower, 0 where it was merged away.
        embeds: ``[n, hidden_size]`` projected visual tokens, as the decoder receives them.
        text_embeds: ``[t, hidden_size]`` embeddings of the text that is read with the image.
        text: that text, without special tokens.
        tiles: ``[n]`` for any-resolution models, which tile a token is from: 0 the whole image, 1 … the crops in
            reading order, then the next image's; -1 none (newline tokens).
        tile_grid: rows and columns of the crops, of a sample with one image.
        pixel_values: the sample's images as the tower receives them; for selectors that change what the tower does.
        image_sizes: their sizes as the model is told them, where they may have any.
    """

    num_visual_tokens: int
    image_grids: tuple[tuple[int, int], ...]
    cls_attention: Tensor | None = None
    received_attention: Tensor | None = None
    last_cls_attention: Tensor | None = None
    global_attention: Tensor | None = None
    keys: Tensor | None = None
    last_keys: Tensor | None = None
    features: Tensor | None = None
    cls_feature: Tensor | None = None
    patch_states: Tensor | None = None
    tower_sizes: Tensor | None = None
    embeds: Tensor | None = None
    text_embeds: Tensor | None = None
    text: str | None = None
    tiles: Tensor | None = None
    tile_grid: tuple[int, int] | None = None
    pixel_values: Tensor | None = None
    image_sizes: Tensor | None = None
    layers: Mapping[str, Tensor] = field(default_factory=dict)

    def tensor(self, name: str) -> Tensor:
        """A field that the selector asked for; DopError if it was not captured."""
        value = self.layers.get(name) if "@" in name else getattr(self, name)
        if value is None:
            raise DopError(f"the selector needs `{name}`, which was not captured; it belongs into `requires`")
        return value

    def to(self, device: torch.device) -> SelectorInputs:
        """The same with its tensors on ``device``."""
        return self.with_tensors({name: value.to(device) for name, value in self.tensors.items()})

    @property
    def tensors(self) -> dict[str, Tensor]:
        """All of its tensors by name."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)} | {**self.layers}

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> SelectorInputs:
        """The same with these tensors, by name."""
        layers = {name: value for name, value in tensors.items() if "@" in name}
        own: dict[str, Any] = {name: value for name, value in tensors.items() if "@" not in name}
        return replace(self, layers={**self.layers, **layers}, **own)

    def survivors_first(self) -> np.ndarray:
        """A ranking where the tower merged or dropped tokens: what is left of them first, in the image's order.

        Newline tokens, which the tower does not compute, are not.
        """
        if self.tower_sizes is None:
            return np.arange(self.num_visual_tokens)
        gone = self.tower_sizes.cpu().numpy() == 0
        if self.tiles is not None:
            gone |= self.tiles.cpu().numpy() < 0
        return np.argsort(gone, kind="stable")


@dataclass(frozen=True)
class Selection:
    """What a selector decided for one sample and one number of kept tokens.

    Attributes:
        order: visual tokens, best first; the first ``num_kept`` enter the decoder.
        slots: visual tokens that receive another feature, all of them among the kept ones.
        features: ``[len(slots), width]`` their features.
        space: whether ``features`` are projector inputs or decoder inputs.
    """

    order: np.ndarray
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    features: Tensor | None = None
    space: Literal["features", "embeds"] = "embeds"


@dataclass(frozen=True)
class SelectionSizes:
    """What the price of a selection depends on, for one sample.

    Attributes:
        num_visual: visual tokens of the sample.
        num_kept: how many of them are kept.
        width: channels of the vision tower.
        num_patches: patches of the tower that these tokens are made of. All are taken to attend to each other, which is
            more than towers compute on several tiles or images; CLS tokens and padding that is cut off are left out.
    """

    num_visual: int
    num_kept: int
    dims: ModelDims
    width: int
    num_patches: int


@dataclass(frozen=True)
class Selector(ABC):
    """Ranks the visual tokens of a sample. A new criterion is one subclass in one file, listed in ``SELECTORS``.

    Options are dataclass fields. ``requires`` names the fields of :class:`SelectorInputs` that have to be captured.
    A selection depends on the sample alone, never on the rest of the batch; equal scores keep the order of the tokens.

    Attributes:
        nested: whether the first ``T`` of one ranking are the choice for every ``T``, so that one ranking serves all.
        merges: whether kept tokens receive other features (:meth:`select`), which depend on their number.
        changes_tower: whether the vision tower itself computes something else (:meth:`patch_tower`).
        several_images: whether it does so on samples of several images.
        version: raised whenever the same options choose other tokens than before, or by other fields, so that nothing
            that was kept with the old choice is read from a cache.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    requires: ClassVar[frozenset[str]] = frozenset()
    nested: ClassVar[bool] = True
    merges: ClassVar[bool] = False
    changes_tower: ClassVar[bool] = False
    several_images: ClassVar[bool] = False

    @abstractmethod
    def rank(self, inputs: SelectorInputs, num_kept: int | None = None) -> np.ndarray:
        """Indices of the visual tokens, best first: a permutation of ``0 .. num_visual_tokens - 1``.

        ``num_kept``: tokens that will be kept, in ``0 .. num_visual_tokens``; ``None``: all. A nested selector may
        leave the tokens after them in any order.
        """

    def select(self, inputs: SelectorInputs, num_kept: int | None = None) -> Selection:
        """The ranking together with merged features. Keeping none or all tokens merges nothing."""
        return Selection(self.rank(inputs, num_kept))

    def needs(self) -> frozenset[str]:
        """Fields of :class:`SelectorInputs` to capture; by default ``requires``, may depend on the options."""
        return self.requires

    def prepare(self, tower_width: int | None) -> None:  # noqa: B027 (optional, not abstract)
        """Load what the selector needs besides the model, before the first image; UnsupportedModelError if it cannot be
        had.

        ``tower_width``: channels of the vision tower, where known.
        """

    def patch_tower(self, adapter: ModelAdapter, num_kept: int) -> TowerPatch:
        """Make the tower compute for ``num_kept`` tokens per sample, until the patch is restored.

        Only for selectors with ``changes_tower``.
        """
        raise NotImplementedError

    def tower_grid(self, adapter: ModelAdapter) -> tuple[int, int] | None:
        """Rows and columns of every image on a tower that the selector changes; ``None``: images have any size.
        UnsupportedModelError if it cannot change this one; by default where images have any size."""
        if (grid := adapter.tower_view.grid) is None:
            raise UnsupportedModelError(
                f"{self.name!r} changes what the vision tower computes and needs images of one size, but "
                f"{type(adapter.model).__name__} takes any; use avg_pool or another selector, "
                "or the method `resize`, which has the processor make smaller images"
            )
        return grid

    def selection_flops(self, sizes: SelectionSizes) -> int:
        """Rough FLOPs of the selection itself for one sample (1 MAC = 2 FLOPs), sorting left out."""
        return 0

    def fewest_tokens(self, num_visual: int, num_layers: int) -> int:
        """The fewest tokens that it can leave.

        Args:
            num_visual: patches of one image without the selector.
            num_layers: layers of the tower up to the one that feeds the projector.
        """
        return 1

    @classmethod
    def option_names(cls) -> tuple[str, ...]:
        return tuple(item.name for item in fields(cls))

    def options(self) -> dict[str, Any]:
        """Values of the options, as :func:`make_selector` takes them; ``None``, which asks for nothing, is left out."""
        values = ((name, getattr(self, name)) for name in self.option_names())
        return {name: value for name, value in values if value is not None}

    @property
    def chooses_per_count(self) -> bool:
        """Whether the choice has to be made again for every number of kept tokens."""
        return self.merges or self.changes_tower or not self.nested


class TowerRun(threading.local):
    """What a changed tower has noticed in this thread.

    Attributes:
        values: of the last run, per field ``[images, patches, 1]``.
        images: images of each sample that comes next; ``None``: one.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.values: dict[str, Tensor] = {}
        self.num_runs = 0
        self.images: tuple[int, ...] | None = None


class TowerPatch(Attached):
    """A change of a vision tower instance; ``run`` is what the tower noticed, for each thread apart."""

    def __init__(self) -> None:
        self.run = TowerRun()
        self.undo = ExitStack()

    def replace_forward(self, module: Any, forward: Any) -> Any:
        """Run ``forward`` in the place of a module's, which is returned, until :meth:`restore`."""
        original = module.forward
        replace_attribute(self.undo, module, "forward", forward)
        return original

    def restore(self) -> None:
        """Make the tower what it was."""
        self.undo.close()


def check_options(holds: bool, rule: str, **values: Any) -> None:
    """Refuse options against a rule, with what they are; DopError if it does not hold."""
    if not holds:
        raise DopError(f"{rule} must hold, but got ({', '.join(f'{name}={value}' for name, value in values.items())})")


def at_layer(attention: str, layer: int | float | str | None) -> str:
    """The name of ``cls_attention``, ``received_attention`` or ``global_attention`` in another layer of the tower.

    Args:
        attention: one of the three.
        layer: its number from 0, or from -1 backwards; how deep it is as a share of the layers, in (0, 1) (.25: the 6th
            of 24); ``middle``: 9 of 24, on Qwen-VL half; ``None``: the layer that feeds the projector, without suffix.
            By depth, a tower that attends within windows has the last layer up to there that attends to whole images.
    """
    if isinstance(layer, float):
        check_options(0.0 < layer < 1.0, "a whole number, or `0 < layer < 1` as the layer's depth,", layer=layer)
    return attention if layer is None else f"{attention}@{layer}"


def descending(scores: Tensor) -> np.ndarray:
    """Indices from the highest score to the lowest; ties keep the order of the tokens. DopError if a score is not
    finite."""
    return np.argsort(-finite_array(scores.detach().float()), kind="stable")


def kept_count(inputs: SelectorInputs, num_kept: int | None) -> int:
    """``num_kept`` as a number within ``0 .. num_visual_tokens``."""
    return inputs.num_visual_tokens if num_kept is None else max(0, min(num_kept, inputs.num_visual_tokens))


def cosine_matrix(rows: Tensor, columns: Tensor | None = None) -> Tensor:
    """Cosine similarity of every row with every column, float32 ``[rows, columns]``."""
    rows = torch.nn.functional.normalize(rows.detach().float(), dim=-1)
    columns = rows if columns is None else torch.nn.functional.normalize(columns.detach().float(), dim=-1)
    return rows @ columns.T


def mean_cosine(rows: Tensor, columns: Tensor) -> Tensor:
    """``[rows]`` mean cosine similarity of every row with all columns, by the mean of the columns' directions."""
    direction = torch.nn.functional.normalize(columns.detach().float(), dim=-1).mean(dim=0)
    return torch.nn.functional.normalize(rows.detach().float(), dim=-1) @ direction


def group_sums(rows: Tensor, groups: Tensor, count: int) -> Tensor:
    """``[count, width]`` float32 sums of ``rows`` ``[n, width]`` by ``groups`` ``[n]``, always in the same order."""
    sizes = groups.bincount(minlength=count)
    return torch.segment_reduce(rows.float()[groups.argsort(stable=True)], "sum", lengths=sizes)


def finite_array(values: Tensor) -> np.ndarray:
    """A float64 array on the host; DopError if a value is not finite."""
    array = values.detach().double().cpu().numpy()
    if not np.isfinite(array).all():
        raise DopError("selection scores contain NaN or infinite values; check the model's dtype and the image")
    return array


def with_rest(chosen: np.ndarray, rest: np.ndarray) -> np.ndarray:
    """A permutation that starts with ``chosen`` and continues with ``rest`` in its own order."""
    return np.concatenate([chosen, rest[~np.isin(rest, chosen)]]).astype(np.int64)
