"""Invented selector inputs: everything that any selector can ask for, for one sample."""

from __future__ import annotations

import torch

from dop_search.selectors import SelectorInputs

LAYERS = (
    "cls_attention@0", "received_attention@0", "cls_attention@0.25", "received_attention@0.25",
    "global_attention@middle",
)  # fmt: skip


def invented(rows: int = 6, columns: int = 8, seed: int = 0, images: int = 1, dtype=torch.float32) -> SelectorInputs:
    generator = torch.Generator().manual_seed(seed)
    count = rows * columns * images

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    def attention() -> torch.Tensor:
        return (3 * torch.rand(count, generator=generator)).exp() / 10 / count

    mean = normal(1, 24)  # projected tokens share a direction, as real ones do
    return SelectorInputs(
        num_visual_tokens=count,
        image_grids=((rows, columns),) * images,
        cls_attention=attention(),
        received_attention=attention(),
        last_cls_attention=attention(),
        global_attention=attention(),
        keys=normal(count, 8),
        last_keys=normal(count, 16),
        features=normal(count, 16),
        cls_feature=normal(1, 16).expand(count, 16),
        patch_states=normal(count, 16),
        embeds=normal(count, 24) + mean,
        text_embeds=normal(5, 24),
        text="how many red circles?",
        layers={name: attention() for name in LAYERS},
    )
