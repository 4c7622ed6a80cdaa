"""What the text of a prompt asks of its visual or context tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from dop_search.models.adapter import ModelAdapter
from dop_search.pruning.attention import signed
from dop_search.pruning.in_decoder.base import StageSample


def text_read_with_image(visual: Tensor, valid: Tensor | None) -> Tensor:
    """``[length]``: the real text tokens after the last visual one; if there are none, all real text tokens."""
    text = ~visual if valid is None else ~visual & valid
    seen = visual.flip(0).cumsum(0).flip(0) > 0
    after = text & ~seen
    return after if bool(after.any()) else text


@torch.no_grad()
def attention_from_text(adapter: ModelAdapter, embeds: Tensor, visual: Tensor, valid: Tensor | None) -> Tensor:
    """Attention that visual tokens receive in the decoder's first layer, from its input alone.

    The mean over heads and over the text after the last of them, which sees them all: a token's place decides nothing.

    Args:
        embeds: ``[length, hidden_size]``.
        visual: ``[length]`` boolean.
        valid: ``[length]`` which tokens are real; ``None``: all.

    Returns:
        ``[number of visual tokens]`` float32.
    """
    real = torch.ones_like(visual) if valid is None else valid
    rows, its = embeds[real], visual[real]
    asking = text_read_with_image(its, None).nonzero()[:, 0]
    cos, sin = adapter.rotary(rows[None], torch.arange(len(rows), device=rows.device)[None])
    candidates = its.nonzero()[:, 0]
    sample = StageSample(adapter.layers[0], rows, cos[0], signed(sin[0]), asking, candidates)
    return sample.attention(asking).mean(dim=(0, 1))[candidates]
