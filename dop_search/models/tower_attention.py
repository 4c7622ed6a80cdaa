"""What the attention of a tower's layer shows, computed from the input of its module: with any attention backend."""

from __future__ import annotations

import itertools
import sys
from typing import Any

import torch
from torch import Tensor, nn

QUERY_BLOCK = 1024
"""Queries whose attention is held at once."""


def cls_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The CLS row of a ViT attention from its input, head-mean: one row of scores, with any backend."""
    query, key = _vit_heads(attention, args, kwargs, queries=slice(0, 1))
    scores = (query @ key.transpose(2, 3)).squeeze(2) * _scale(attention)
    return scores.float().softmax(dim=-1).mean(dim=1)[:, 1:]


def received_attention(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], cls_asks: bool = False) -> Tensor:
    """Attention that each patch receives: mean over heads and over the patches that ask, and a CLS token if it does.

    The softmax runs over all keys, a CLS token included. Works block by block of queries, with any backend.
    """
    if _is_packed(attention, kwargs):
        return _received_packed(attention, args, kwargs)
    query, key = _vit_heads(attention, args, kwargs, queries=slice(None))
    first = int(_has_cls(attention))
    asking = query if cls_asks else query[:, :, first:]
    return _mean_received(asking, key, _scale(attention), _real(kwargs))[:, first:]


def head_mean_keys(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Keys of the patches, mean over heads, after their rotation if there is one: ``[images, patches, head_dim]``."""
    if _is_packed(attention, kwargs):
        return _packed_heads(attention, args, kwargs)[1].float().mean(dim=1)
    key = _vit_heads(attention, args, kwargs, queries=slice(0, 1))[1]
    return key.float().mean(dim=1)[:, int(_has_cls(attention)) :]


def _real(kwargs: dict[str, Any]) -> Tensor | None:
    """Which patches of a batch of tiles are no padding, ``[batch, patches]``; ``None``: all."""
    mask: Tensor | None = kwargs.get("attention_mask")
    if mask is None:
        return None
    return mask[:, 0, 0] if mask.dtype == torch.bool else mask[:, 0, 0] == 0


def _mean_received(query: Tensor, key: Tensor, scale: float, real: Tensor | None = None) -> Tensor:
    """``[batch, heads, queries, dim]`` and ``[batch, heads, keys, dim]`` to ``[batch, keys]``."""
    total = torch.zeros(key.shape[0], key.shape[2], dtype=torch.float32, device=key.device)
    for start in range(0, query.shape[2], QUERY_BLOCK):
        scores = query[:, :, start : start + QUERY_BLOCK] @ key.transpose(2, 3) * scale
        if real is not None:  # padding neither asks nor is seen
            scores = scores.masked_fill(~real[:, None, None], -torch.inf)
            scores = scores.masked_fill(~real[:, None, start : start + QUERY_BLOCK, None], -torch.inf)
        shares = scores.float().softmax(dim=-1).mean(dim=1)
        total += (shares if real is None else shares.nan_to_num(0.0)).sum(dim=1)
    return total / (query.shape[2] if real is None else real.sum(dim=1, keepdim=True))


def _has_cls(attention: Any) -> bool:
    return attention.config.model_type in ("clip_vision_model", "dinov2", "internvl_vision", "qianfan_ocr_vision")


def _scale(attention: Any) -> float:
    return float(attention.scale if hasattr(attention, "scale") else attention.scaling)


def _vit_heads(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any], queries: slice) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[batch, heads, length, head_dim]`` of a tower that works tile by tile."""
    hidden, heads = args[0] if args else kwargs["hidden_states"], (-1, attention.head_dim)
    query, key = attention.q_proj(hidden[:, queries]), attention.k_proj(hidden)
    if (rotate := _rotates_tiles(attention)) is not None:
        places = (*kwargs["position_embeddings"], kwargs["position_ids"])
        query = rotate(attention.q_norm(query.unflatten(-1, heads)), *(part[:, queries] for part in places))
        return query.transpose(1, 2), rotate(attention.k_norm(key.unflatten(-1, heads)), *places).transpose(1, 2)
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    return query.unflatten(-1, heads).transpose(1, 2), key.unflatten(-1, heads).transpose(1, 2)


def _is_packed(attention: Any, kwargs: dict[str, Any]) -> bool:
    if _rotates_tiles(attention) is not None:
        return False
    return kwargs.get("position_embeddings") is not None or kwargs.get("cu_seqlens") is not None


def _rotates_tiles(attention: Any) -> Any:
    """Gemma 4's function that rotates heads by the place of their patch in its tile; ``None``: another tower."""
    return getattr(sys.modules[type(attention).__module__], "apply_multidimensional_rope", None)


def _received_packed(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Towers (Qwen, Pixtral, MiniCPM-V) with the patches of all images in one row; ``[1, patches]``."""
    query, key = _packed_heads(attention, args, kwargs)
    parts = [
        _mean_received(query[:, :, start:stop], key[:, :, start:stop], attention.scaling)
        for start, stop in itertools.pairwise(_image_ends(kwargs, key.shape[2]))
    ]
    return torch.cat(parts, dim=1)


def _packed_heads(attention: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Queries and keys ``[1, heads, patches, head_dim]`` of such a tower, rotated where it does so."""
    hidden = args[0] if args else kwargs["hidden_states"]
    rows = hidden.reshape(-1, hidden.shape[-1])
    if hasattr(attention, "qkv"):
        qkv, two = attention.qkv, 2 * attention.qkv.out_features // 3
        plain = type(qkv) is nn.Linear and qkv.bias is not None  # values are not needed
        both = nn.functional.linear(rows, qkv.weight[:two], qkv.bias[:two]) if plain else qkv(rows)[:, :two]
        query, key = both.reshape(len(rows), 2, attention.num_heads, -1).unbind(1)
    else:
        query, key = (
            part(rows).unflatten(-1, (attention.num_heads, -1)) for part in (attention.q_proj, attention.k_proj)
        )
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    if kwargs.get("position_embeddings") is not None:
        cos, sin = (part.float()[:, None, :] for part in kwargs["position_embeddings"])
        query, key = (_rotate(heads.float(), cos, sin).to(hidden.dtype) for heads in (query, key))
    return query.transpose(0, 1)[None], key.transpose(0, 1)[None]


def _image_ends(kwargs: dict[str, Any], num_patches: int) -> list[int]:
    """Where the images of a packed row end, from 0 on: by their lengths, or by a mask of blocks."""
    for name in ("cu_seqlens", "cu_seq_lens_q"):
        if kwargs.get(name) is not None:
            return [int(end) for end in kwargs[name]]
    seen = kwargs["attention_mask"][0, 0] == 0  # additive
    first = seen.int().argmax(dim=-1)  # the first patch that each patch sees
    return [*(first.diff(prepend=first[:1] - 1).nonzero()[:, 0].tolist()), num_patches]


def _rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = heads.shape[-1] // 2
    return heads * cos + torch.cat((-heads[..., half:], heads[..., :half]), dim=-1) * sin
