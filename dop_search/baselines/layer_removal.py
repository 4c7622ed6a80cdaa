"""Whole decoder layers removed for all tokens, text included, with an optional low-rank repair of the final states.

A :class:`dop_search.strategy.Strategy` keeps every operation of text tokens, so this is a runtime of its own. It takes
layers out of the decoder and renumbers the rest, so that caches, masks and a strategy for the remaining depth work as
on a shallower model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dop_search.models.families import adapter_for
from dop_search.models.layer_names import mixer_of
from dop_search.pruning import pruned
from dop_search.strategy import Strategy
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.utils.errors import DopError


@dataclass(frozen=True, eq=False)
class LowRankRepair:
    """Adds ``x down up + bias`` to the states before the final norm.

    Attributes:
        down: ``[hidden_size, rank]``.
        up: ``[rank, hidden_size]``.
        bias: ``[hidden_size]``.
    """

    down: Tensor
    up: Tensor
    bias: Tensor

    @classmethod
    def fit(cls, states: Tensor, wanted: Tensor, rank: int, ridge: float = 1e-2) -> LowRankRepair:
        """Ridge regression of ``wanted - states`` on ``states`` (``[rows, hidden_size]``), cut to ``rank`` by SVD.

        ``ridge`` is relative to the mean squared length of a feature.
        """
        x, difference = states.double(), wanted.double() - states.double()
        mean_x, mean_d = x.mean(dim=0), difference.mean(dim=0)
        x, difference = x - mean_x, difference - mean_d
        gram = x.T @ x
        penalty = ridge * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
        weight = torch.linalg.solve(gram + penalty, x.T @ difference)
        left, sizes, right = torch.linalg.svd(weight, full_matrices=False)
        down, up = left[:, :rank] * sizes[:rank], right[:rank]
        return cls(*(part.to(states.dtype) for part in (down, up, mean_d - (mean_x @ down) @ up)))

    @property
    def rank(self) -> int:
        """Width of the bottleneck."""
        return self.down.shape[1]

    @property
    def digest(self) -> str:
        """A hash of what it adds."""
        values = torch.cat([part.flatten() for part in (self.down, self.up, self.bias)])
        return hashlib.sha256(values.double().cpu().numpy().tobytes()).hexdigest()[:16]

    def flops(self, dims: ModelDims, counts: TokenCounts, num_visual: int) -> int:
        """FLOPs on all rows of one sample's prefill."""
        return 2 * 2 * dims.hidden_size * self.rank * (counts.text + num_visual)

    def __call__(self, states: Tensor) -> Tensor:
        """Repaired states of any leading shape."""
        return states + (states @ self.down) @ self.up + self.bias


@contextmanager
def layers_removed(
    model: PreTrainedModel,
    removed: Collection[int],
    num_visual_tokens: int | None = None,
    repair: LowRankRepair | None = None,
    **fields: Any,
) -> Iterator[PreTrainedModel]:
    """Within the context ``model`` lacks some decoder layers; on exit, also by an exception, it is what it was.
    DopError if a layer does not exist, or none would be left.

    Vision features that a decoder adds after its first layers are then added after the first that are left.

    Args:
        model: a supported model, not pruned.
        removed: layers to take out.
        num_visual_tokens: tokens that enter the decoder; ``None``: all.
        repair: of the states before the final norm.
        **fields: further fields of the strategy that picks the tokens, such as its selector.
    """
    adapter = adapter_for(model)
    text_model = adapter.text_model
    layers, config = text_model.layers, text_model.config
    if not set(removed) <= set(range(len(layers))) or len(set(removed)) == len(layers):
        raise DopError(
            f"`removed` must name some of the layers 0..{len(layers) - 1} and leave one, but got {sorted(removed)}"
        )
    if "forward" in vars(text_model):
        raise DopError("the model is pruned; leave `pruned(...)` before removing layers")
    kept = [index for index in range(len(layers)) if index not in set(removed)]
    previous = {"num_hidden_layers": config.num_hidden_layers}
    if getattr(config, "layer_types", None) is not None:
        previous["layer_types"] = config.layer_types
    numbers = [mixer_of(layer).layer_idx for layer in layers]
    handle = None
    try:
        text_model.layers = nn.ModuleList([layers[index] for index in kept])
        config.num_hidden_layers = len(kept)
        if "layer_types" in previous:
            config.layer_types = [previous["layer_types"][index] for index in kept]
        for number, layer in enumerate(text_model.layers):
            mixer_of(layer).layer_idx = number
        if repair is not None:
            handle = adapter.final_norm.register_forward_pre_hook(lambda module, args: (repair(args[0]), *args[1:]))
        with pruned(model, Strategy.full(len(kept), num_visual_tokens=num_visual_tokens, **fields)):
            yield model
    finally:
        if handle is not None:
            handle.remove()
        text_model.layers = layers
        for name, value in previous.items():
            setattr(config, name, value)
        for number, layer in zip(numbers, layers, strict=True):
            mixer_of(layer).layer_idx = number
