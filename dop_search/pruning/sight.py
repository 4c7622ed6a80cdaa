"""What a query may see beside what comes before it: images as a whole, and no more than a window.

Both go by the places of the tokens in what was fed, pads and skipped tokens included, as in transformers: a token that
is skipped moves no window. A model of transformers draws its masks before it calls its decoder, and draws them for
tokens that are all there; a pruned decoder needs what they were drawn from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NO_IMAGE = -1


@dataclass(frozen=True)
class Sight:
    """Where the tokens of a sample, or the rows of a layout, stand.

    Attributes:
        place: number of each in what was fed to its sample.
        image: which image of its sample it is part of, where the tokens of an image see each other; else ``NO_IMAGE``.
        in_windows: whether they see each other only in layers with a window.
    """

    place: np.ndarray
    image: np.ndarray
    in_windows: bool = False

    def at(self, index: np.ndarray | slice) -> Sight:
        """Of some of them."""
        return Sight(self.place[index], self.image[index], self.in_windows)

    @staticmethod
    def joined(parts: Sequence[Sight]) -> Sight:
        """Of several samples, one after the other."""
        place, image = (np.concatenate([getattr(part, name) for part in parts]) for name in ("place", "image"))
        return Sight(place, image, parts[0].in_windows)

    @property
    def key(self) -> bytes:
        """What two of them that are the same have in common."""
        return self.place.tobytes() + self.image.tobytes()

    def is_causal(self, queries: np.ndarray, keys: np.ndarray, window: int | None, num_past: int) -> bool:
        """Whether the rows ``queries`` see all rows ``keys``, and ``num_past`` earlier ones, that came before.

        ``True`` only where that is simple to find; a mask is right in any case.
        """
        if (self.image[keys] != NO_IMAGE).any() and not (window is None and self.in_windows):
            return False
        if window is None or not len(queries) or not len(keys):
            return True
        first = 0 if num_past else int(self.place[keys].min())
        return int(self.place[queries].max()) - first < window


def image_numbers(is_image: np.ndarray) -> np.ndarray:
    """Number of the image that each token is part of, a new one after every gap; ``NO_IMAGE`` outside.

    ``is_image``: ``[..., length]`` boolean.
    """
    starts = is_image.copy()
    starts[..., 1:] &= ~is_image[..., :-1]
    return np.where(is_image, np.cumsum(starts, axis=-1) - 1, NO_IMAGE)


def sights_of(num_seen: int, whole: np.ndarray, in_windows: bool = False) -> list[Sight]:
    """The tokens of each sample, after ``num_seen`` others; ``whole`` (``[batch, length]``): parts of images."""
    place = np.arange(num_seen, num_seen + whole.shape[1])
    return [Sight(place, image, in_windows) for image in image_numbers(whole)]


class TokenMasks(dict[str, Tensor]):
    """What a model draws its masks from, in their place: models hand a dictionary on to their decoder as it is.

    Args:
        attention_mask: ``[batch, length so far]``, ``None``: all are real.
        token_type_ids: ``[batch, length]``, 1 in images, 2 in videos; ``None``: no token sees what comes after it.
    """

    def __init__(self, attention_mask: Any, token_type_ids: Tensor | None) -> None:
        super().__init__()
        self.attention_mask, self.token_type_ids = attention_mask, token_type_ids

    @classmethod
    def of_call(cls, kwargs: dict[str, Any], types: str | None) -> dict[str, Any]:
        """The arguments of a model's call with these in the place of its attention mask; ``types``: by what name the
        model is given the types of tokens, ``None``: it does not ask."""
        mask, given = kwargs.get("attention_mask"), None if types is None else kwargs.get(types)
        return {**kwargs, "attention_mask": cls(mask, given)}

    @staticmethod
    def undone(attention_mask: Any, length: int) -> tuple[Any, Tensor | None]:
        """The attention mask, and which of the last ``length`` tokens are parts of images (``[batch, length]``).

        Types that are too few are those of the first tokens, as in transformers.
        """
        if not isinstance(attention_mask, TokenMasks):
            return attention_mask, None
        types = attention_mask.token_type_ids
        if types is not None:
            types = torch.nn.functional.pad(types, (0, max(0, length - types.shape[1])))[:, -length:] > 0
        return attention_mask.attention_mask, types


def within_window(query_places: Tensor, key_places: Tensor, window: int) -> Tensor:
    """Which keys are not too far back: ``[..., num_queries, num_keys]`` boolean."""
    return key_places[..., None, :] > query_places[..., :, None] - window


def window_of(layer: Any) -> int | None:
    """The window of a decoder layer; ``None``: it sees everything."""
    window: int | None = getattr(getattr(layer, "self_attn", None), "sliding_window", None)
    return window


def append_places(past: Tensor | None, new: Tensor) -> Tensor:
    """Places of the keys in a cache: ``[batch, past + new]``."""
    return new if past is None else torch.cat([past.to(new.device), new], dim=1)
