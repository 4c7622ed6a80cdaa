"""The text side of the CLIP model that a vision tower comes from: multimodal checkpoints leave it out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from dop_search.selectors.base import Selector
from dop_search.utils.errors import UnsupportedModelError


@dataclass(frozen=True)
class ClipText:
    """CLIP's text encoder and both projections into the shared space.

    Attributes:
        model: a ``CLIPModel`` whose vision encoder has been dropped.
    """

    model: Any
    tokenizer: Any

    @property
    def tower_width(self) -> int:
        """Channels of the vision tower that it belongs to."""
        return int(self.model.visual_projection.in_features)

    @property
    def longest(self) -> int:
        """Tokens that the encoder can take, its begin and end tokens included."""
        return int(self.model.config.text_config.max_position_embeddings)

    @torch.inference_mode()
    def pieces(self, text: str) -> Tensor:
        """``[pieces, projection_dim]`` of a text, its tokens cut where the encoder ends, wherever that is.

        As CDPruner's released code does: only the first piece has a begin token, only the last an end token.
        """
        ids = self.tokenizer(text)["input_ids"]
        return torch.cat(
            [self._pooled(ids[start : start + self.longest]) for start in range(0, len(ids), self.longest)]
        )

    @torch.inference_mode()
    def beginning(self, text: str) -> Tensor:
        """``[1, projection_dim]`` of as much of a text as the encoder can take, as TRIM's released code does."""
        return self._pooled(self.tokenizer(text, truncation=True, max_length=self.longest)["input_ids"])

    def _pooled(self, ids: list[int]) -> Tensor:
        device = self.model.text_projection.weight.device
        pooled = self.model.text_model(input_ids=torch.tensor([ids], device=device)).pooler_output
        projected: Tensor = self.model.text_projection(pooled)
        return projected

    @torch.inference_mode()
    def project_patches(self, patch_states: Tensor) -> Tensor:
        """``[n, projection_dim]`` of ``[n, width]`` states of the tower after its final norm."""
        weight = self.model.visual_projection.weight
        return patch_states.to(weight.device, torch.float32) @ weight.T


@dataclass(frozen=True)
class ClipSelector(Selector):
    """A method that compares patches and question in CLIP's space.

    Options:
        clip: hub id or folder of the CLIP checkpoint that the vision tower comes from: multimodal checkpoints have no
            text encoder. Without it the selector refuses; :attr:`stand_in` needs none.
    """

    stand_in: ClassVar[str]
    clip: str = ""

    def prepare(self, tower_width: int | None) -> None:
        self.encoder(tower_width)

    def encoder(self, tower_width: int | None = None) -> ClipText:
        """The text encoder, for a tower of that width where it is known."""
        return clip_text(self.clip, self.name, self.stand_in, tower_width)


def clip_text(path: str, method: str, variant: str, tower_width: int | None) -> ClipText:
    """The text encoder of the checkpoint at ``path``; UnsupportedModelError if no checkpoint is named, it cannot be
    read, or belongs to another tower."""
    if not path:
        raise UnsupportedModelError(
            f"{method!r} compares image and question in CLIP's space, but the model has no text encoder of its own; "
            f"set the option clip=<hub id or folder of the CLIP checkpoint that the vision tower comes from>, or use "
            f"selector={variant}, which compares them in the decoder's embedding space"
        )
    found = _load(path)
    if tower_width is not None and found.tower_width != tower_width:
        raise UnsupportedModelError(
            f"the vision tower has {tower_width} channels, but {path!r} is for {found.tower_width}; "
            "set clip= to the checkpoint that the vision tower comes from"
        )
    return found


@lru_cache(maxsize=2)
def _load(path: str) -> ClipText:
    from transformers import AutoTokenizer, CLIPModel

    try:
        model: Any = CLIPModel.from_pretrained(path, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except OSError as error:
        raise UnsupportedModelError(f"cannot load CLIP from {path!r}: {str(error).splitlines()[0]}") from error
    del model.vision_model
    return ClipText(model.eval(), tokenizer)
