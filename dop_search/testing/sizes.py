"""Token ids and sizes that the tiny models, their tokenizer and their inputs share."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

PAD_TOKEN_ID = 0
IMAGE_TOKEN_ID = 1
VIDEO_TOKEN_ID = 2
VISION_START_TOKEN_ID = 3
VISION_END_TOKEN_ID = 4
NUM_SPECIAL_TOKENS = 5
"""Token ids below this are never text: drawn by no input, suppressed in ``generate``."""

ANYRES_TILE_SIZE = 28
"""Side of a tile of the any-resolution families in pixels; 2 x 2 patches."""


@dataclass(frozen=True)
class TinySizes:
    """Sizes of a tiny decoder; the defaults have two query heads per key head."""

    num_hidden_layers: int = 4
    hidden_size: int = 32
    intermediate_size: int = 48
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    vocab_size: int = 96

    def text(self, **extra: Any) -> dict[str, Any]:
        """Keyword arguments of a Llama-like text config; no token ends a generation."""
        return {**asdict(self), "bos_token_id": None, "eos_token_id": None, "pad_token_id": PAD_TOKEN_ID, **extra}
