"""What a CLIP- or SigLIP-style vision tower shows to a selector while it encodes images: only the rows that are needed.

Nothing here needs eager attention: scores are computed from the input of the attention module, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from dop_search.errors import UnsupportedModelError

QUERY_BLOCK = 256
"""Queries whose scores are held at once for ``received_attention``: the whole map is never stored."""

TOWER_FIELDS = (
    "cls_attention",
    "received_attention",
    "first_cls_attention",
    "last_cls_attention",
    "keys",
    "last_keys",
    "features",
    "cls_feature",
    "patch_states",
)
"""What can be captured; see ``dop_search.selectors.SelectorInputs`` for their meaning."""

CLS_FIELDS = frozenset({"cls_attention", "first_cls_attention", "last_cls_attention", "cls_feature", "patch_states"})


@dataclass(frozen=True)
class VisionTower:
    """A vision tower that selectors can look into.

    Attributes:
        module: its forward takes ``pixel_values`` and ``interpolate_pos_encoding``.
        layers: encoder layers with ``layer_norm1``, ``self_attn`` (``q_proj``, ``k_proj``), ``layer_norm2``, ``mlp``.
        feature_layer: index of the layer whose output the projector receives.
        has_cls: whether the first token is a CLS token, which the projector does not receive.
        width: channels.
        patch_size: pixels per side of a patch.
        grid: rows and columns of the visual tokens of every image, where each image is one run of the tower and each
            patch one token; ``None`` otherwise (any-resolution tiles).
        final_norm: norm after the last layer; ``None`` if the tower has none.
        project: from projector inputs ``[n, width]`` to decoder inputs ``[n, hidden_size]``, token by token; ``None``
            where the projector mixes tokens.
    """

    module: Any
    layers: Sequence[Any]
    feature_layer: int
    has_cls: bool
    width: int
    patch_size: int
    grid: tuple[int, int] | None
    final_norm: Any | None
    project: Callable[[Tensor], Tensor] | None

    @property
    def num_extra(self) -> int:
        """Tokens in front of the patches."""
        return int(self.has_cls)


def refuse(wanted: Iterable[str], why: str) -> UnsupportedModelError:
    """The error for a tower that cannot give what a selector needs."""
    return UnsupportedModelError(
        f"{why}, so that {', '.join(f'`{name}`' for name in sorted(wanted))} cannot be had from it; selectors that "
        "work on every model are uniform_grid, random, divprune, cdpruner_llm, trim_llm and avg_pool"
    )


class TowerWatch:
    """Watches a tower; after each of its forwards ``values`` holds ``[visual tokens, channels]`` per field.

    Args:
        tower: the tower.
        names: of :data:`TOWER_FIELDS`.
        to_token_order: from ``[images or tiles, patches, channels]`` to ``[visual tokens, channels]``; called while the
            tower runs.

    Raises:
        UnsupportedModelError: if the tower has no CLS token and a name needs one.
    """

    def __init__(self, tower: VisionTower, names: Iterable[str], to_token_order: Callable[[Tensor], Tensor]) -> None:
        self.tower, self.names, self.to_token_order = tower, frozenset(names), to_token_order
        if not tower.has_cls and (missing := self.names & CLS_FIELDS):
            raise refuse(missing, "the vision tower has no CLS token (try the selector's option attention=received)")
        self.values: dict[str, Tensor] = {}
        self.handles: list[RemovableHandle] = []
        feature, last = tower.feature_layer, len(tower.layers) - 1
        at_feature = self.names & {"cls_attention", "received_attention", "keys"}
        for layer, wanted in ((feature, at_feature), (0, {"first_cls_attention"}), (last, {"last_keys"})):
            if layer == last and "last_cls_attention" in self.names:
                wanted = {*wanted, "last_cls_attention"}
            if wanted := wanted & self.names:
                self._watch_attention(tower.layers[layer].self_attn, frozenset(wanted))
        if self.names & {"features", "cls_feature"}:
            self.handles.append(tower.layers[feature].register_forward_hook(self._keep_features))
        if "patch_states" in self.names:
            self.handles.append(tower.layers[last].register_forward_hook(self._keep_states))

    def close(self) -> None:
        """Stop watching."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    def _watch_attention(self, attention: Any, wanted: frozenset[str]) -> None:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = (args[0] if args else kwargs["hidden_states"]).detach()
            for name, values in attention_values(attention, hidden, wanted, self.tower.num_extra).items():
                self.values[name] = self.to_token_order(values)

        self.handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))

    def _keep_features(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        patches = output[:, self.tower.num_extra :].detach()
        if "features" in self.names:
            self.values["features"] = self.to_token_order(patches)
        if "cls_feature" in self.names:
            self.values["cls_feature"] = self.to_token_order(output[:, :1].detach().expand_as(patches))

    def _keep_states(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        norm = self.tower.final_norm
        states = output[:, self.tower.num_extra :].detach()
        self.values["patch_states"] = self.to_token_order(states if norm is None else norm(states))


def attention_values(attention: Any, hidden: Tensor, wanted: frozenset[str], num_extra: int) -> dict[str, Tensor]:
    """Scores and keys of one attention module from its input.

    Args:
        attention: has ``q_proj``, ``k_proj``, ``num_heads`` and ``head_dim``.
        hidden: ``[images, num_extra + patches, width]``.
        wanted: fields to compute.
        num_extra: tokens in front of the patches.

    Returns:
        Per field ``[images, patches, channels]`` in float32.
    """
    batch, length, _ = hidden.shape
    heads = (batch, length, attention.num_heads, attention.head_dim)
    flat_keys = attention.k_proj(hidden).float()
    keys = flat_keys.view(heads).transpose(1, 2)
    scale = attention.head_dim**-0.5
    result: dict[str, Tensor] = {}
    if wanted & {"cls_attention", "first_cls_attention", "last_cls_attention"}:
        flat_query = attention.q_proj(hidden[:, :1]).float()
        query = flat_query.view(batch, 1, *heads[2:]).transpose(1, 2)
        row = (query @ keys.transpose(2, 3) * scale).softmax(dim=-1).mean(dim=1)[:, 0, num_extra:, None]
        for name in wanted & {"cls_attention", "first_cls_attention"}:
            result[name] = row
        if "last_cls_attention" in wanted:
            full_width = flat_query @ flat_keys.transpose(1, 2) * flat_keys.shape[-1] ** -0.5
            result["last_cls_attention"] = full_width.softmax(dim=-1)[:, 0, num_extra:, None]
    if "received_attention" in wanted:
        queries = attention.q_proj(hidden).float().view(heads).transpose(1, 2)[:, :, num_extra:]
        received = torch.zeros(batch, length, device=hidden.device)
        for start in range(0, queries.shape[2], QUERY_BLOCK):
            block = queries[:, :, start : start + QUERY_BLOCK] @ keys.transpose(2, 3) * scale
            received += block.softmax(dim=-1).sum(dim=2).mean(dim=1)
        result["received_attention"] = (received / queries.shape[2])[:, num_extra:, None]
    if "keys" in wanted:
        result["keys"] = keys.mean(dim=1)[:, num_extra:]
    if "last_keys" in wanted:
        result["last_keys"] = flat_keys[:, num_extra:]
    return result


def tower_flops(tower: VisionTower, tokens: Sequence[tuple[int, int]]) -> int:
    """FLOPs of the encoder layers on one image (1 MAC = 2 FLOPs; norms and the patch embedding left out).

    Args:
        tower: the tower.
        tokens: per layer the patches in attention and in the MLP (see ``Selector.tower_tokens``); layers after these
            run on as many patches as the last one's MLP.
    """
    inner = tower.layers[0].mlp.fc1.out_features
    padded = [*tokens, *[(tokens[-1][1], tokens[-1][1])] * (len(tower.layers) - len(tokens))]
    total = 0
    for patches_in, patches_out in padded:
        n_in, n_out = patches_in + tower.num_extra, patches_out + tower.num_extra
        total += 8 * n_in * tower.width**2 + 4 * n_in**2 * tower.width + 4 * n_out * tower.width * inner
    return total
