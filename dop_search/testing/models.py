"""Weights for a small random model, so that skipping any operation moves its logits far more than rounding does."""

from __future__ import annotations

import torch
from torch import nn


def randomize_(model: nn.Module, seed: int, gain: float = 1.5) -> None:
    """Draw every parameter anew: matrices of variance ``gain² / fan_in``, norms and scales of layers near 1, biases
    near 0; decays of recurrent layers slow, so that their states are of many tokens.

    The usual 0.02 initialisation leaves attention uniform and the residual stream almost untouched, and then a wrong
    mask hides behind the tolerance.
    """
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            if id(parameter) in embeddings:
                value = noise
            elif ".experts." in name:  # [experts, out, in]
                value = noise * gain / parameter.shape[-1] ** 0.5
            elif ".stages." in name and parameter.ndim == 4:  # of a convolutional tower, whose branches add up
                value = noise * gain / 3 / parameter[0].numel() ** 0.5
            elif parameter.ndim >= 2:
                value = noise * gain / parameter[0].numel() ** 0.5
            elif name.endswith("weight"):
                value = 1.0 + 0.1 * noise
            else:
                value = 0.2 * noise - (3.0 if name.endswith("A_log") else 0.0)
            parameter.copy_(value)
        for name, scale in model.named_buffers():
            if name.endswith("layer_scalar"):
                scale.fill_(1.0 + 0.2 * float(torch.randn((), generator=generator)))
