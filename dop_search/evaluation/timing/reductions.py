"""What others do at the same FLOPs, written without our runtime: the bound, and the plain hook.

Both drop visual tokens for good and leave the Hugging Face decoder as it is.

* :func:`reduced_before_decoder` drops rows of ``inputs_embeds`` before the first layer. What runs is the plain
  decoder on a shorter sequence: no implementation of uniform token reduction can be faster.
* :func:`dropped_by_hooks` drops them in front of one layer by forward pre-hooks, as toy implementations of FastV do.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dop_search.models.families import adapter_for
from dop_search.utils.errors import DopError


def evenly_spaced(num_visual: int, num_kept: int) -> np.ndarray:
    """Indices of ``num_kept`` of ``num_visual`` tokens, evenly spaced, ascending."""
    return np.floor((np.arange(num_kept) + 0.5) * num_visual / max(num_kept, 1)).astype(np.int64)


def kept_columns(visual: Tensor, num_kept: int) -> Tensor:
    """Columns of a prompt (``visual``: ``[batch, length]``, equal rows) that stay when few visual tokens do.

    Raises:
        DopError: if the rows differ.
    """
    is_visual = visual[0].cpu().numpy()
    if not bool((visual == visual[:1]).all()):
        raise DopError("uniform reduction is timed on one prompt, but the rows of the batch differ; give equal rows")
    positions = np.flatnonzero(is_visual)
    keep = ~is_visual
    keep[positions[evenly_spaced(len(positions), num_kept)]] = True
    return torch.from_numpy(np.flatnonzero(keep)).to(visual.device)


@contextmanager
def reduced_before_decoder(model: PreTrainedModel, columns: Tensor, length: int) -> Iterator[None]:
    """Within the context only ``columns`` of a prompt of ``length`` tokens enter the decoder; positions stay.

    Later tokens see what was kept. Prompts without padding, all alike.
    """

    def shorten(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        changed, embeds = dict(kwargs), kwargs["inputs_embeds"]
        mask = kwargs.get("attention_mask")
        if embeds.shape[1] == length:
            positions = kwargs.get("position_ids")
            if positions is None:
                positions = torch.arange(length, device=embeds.device)[None]
            changed["position_ids"] = positions.index_select(-1, columns)
            changed["inputs_embeds"] = embeds.index_select(1, columns)
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= length:
            changed["attention_mask"] = torch.cat([mask.index_select(1, columns), mask[:, length:]], dim=1)
        return args, changed

    handle = adapter_for(model).text_model.register_forward_pre_hook(shorten, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def dropped_by_hooks(model: PreTrainedModel, columns: Tensor, length: int, first_layer: int = 2) -> Iterator[None]:
    """Within the context layers from ``first_layer`` on see only ``columns`` of a prompt of ``length`` tokens.

    The decoder prepares positions and masks once, for the whole prompt; the hooks cut them down in every layer.
    """

    def cut_mask(mask: Tensor, is_prefill: bool) -> Tensor:
        later = torch.arange(length, mask.shape[-1], device=mask.device)
        mask = mask.index_select(-1, torch.cat([columns, later]))
        return mask.index_select(-2, columns) if is_prefill else mask

    def hook_of(layer: int) -> Any:
        def cut(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            changed = dict(kwargs)
            cos, sin = kwargs["position_embeddings"]
            is_prefill = cos.shape[1] == length
            if is_prefill:
                changed["position_embeddings"] = (cos.index_select(1, columns), sin.index_select(1, columns))
                positions = kwargs.get("position_ids")
                if positions is not None:
                    changed["position_ids"] = positions.index_select(-1, columns)
                if layer == first_layer:
                    args = (args[0].index_select(1, columns), *args[1:])
            mask = kwargs.get("attention_mask")
            if isinstance(mask, Tensor) and mask.ndim == 4:
                changed["attention_mask"] = cut_mask(mask, is_prefill)
            return args, changed

        return cut

    with ExitStack() as stack:
        for index, layer in enumerate(adapter_for(model).layers):
            if index >= first_layer:
                handle = layer.register_forward_pre_hook(hook_of(index), with_kwargs=True)
                stack.callback(handle.remove)
        yield
