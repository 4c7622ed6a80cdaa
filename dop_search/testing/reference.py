"""The masked dense reference: what a strategy means, computed without skipping anything.

Plain transformers models with hooks. Every module runs on every token; what the strategy skips is hidden afterwards:

Attention is causal, within the window of layers that have one (by positions in what was fed), and in both directions
among the tokens of an image where ``token_type_ids`` say so.

* keys and values: their columns of the attention mask are closed in that layer;
* queries: the attention output of their rows is replaced by zero, so that the residual stream passes unchanged;
* recurrent layers: their output is computed anew, token by token, over the tokens that have keys and values there;
  one that has queries alone leaves the state as it finds it;
* MLP: the MLP output of their rows is replaced by zero.

Visual tokens outside the first ``num_visual_tokens`` of the ranking have no operation in any layer. The prompt's last
token runs every operation, also where it is visual. Positions are the original ones. The strategy is applied as given,
not in its canonical form. Shares no code with the runtime, and is no faster than the full model: an oracle for tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dop_search.models import adapter_for
from dop_search.models.text import MARKERS_KEY
from dop_search.strategy import Strategy
from dop_search.strategy.operations import MODULES
from dop_search.utils.errors import DopError, StrategyError, UnsupportedModelError

Rankings = Sequence[np.ndarray]
"""Per sample: the indices ``0..num_visual-1`` of its visual tokens in sequence order, best first."""


@dataclass(frozen=True)
class OperationMasks:
    """Which positions run which module: boolean tensors ``[layer, batch, position]``, text always ``True``."""

    q: Tensor
    kv: Tensor
    mlp: Tensor


def visual_token_ids(model: PreTrainedModel) -> tuple[int, ...]:
    """The placeholder token ids that the model replaces by visual features (image, and video where it has one); of a
    model that reads text alone those of its markers. UnsupportedModelError if neither it nor an adapter names any."""
    if (markers := getattr(model.config, MARKERS_KEY, None)) is not None:
        return tuple(token for marker in markers for token in marker)
    names = ("image_token_id", "video_token_id")
    ids = tuple(token for name in names if (token := getattr(model.config, name, None)) is not None)
    return ids or adapter_for(model).visual_token_ids


def visual_positions(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Boolean ``[batch, position]``: where the visual tokens stand, or what stands between markers."""
    if (markers := getattr(model.config, MARKERS_KEY, None)) is not None:
        return torch.tensor([_between(row, *markers) for row in input_ids.tolist()], device=input_ids.device)
    return torch.isin(input_ids, torch.tensor(visual_token_ids(model), device=input_ids.device))


def _between(row: list[int], opening: list[int], closing: list[int]) -> list[bool]:
    """Token by token: what comes after an opening marker and before the closing one."""
    inside, place = [False] * len(row), 0
    while place < len(row):
        if row[place : place + len(opening)] == opening:
            first = place = place + len(opening)
            while place < len(row) and row[place : place + len(closing)] != closing:
                place += 1
            if place < len(row):
                inside[first:place] = [True] * (place - first)
        place += 1
    return inside


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The decoder as transformers itself finds it, not the adapter."""
    decoder: nn.Module = model.get_decoder()
    return decoder


def text_positions(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor:
    """Boolean ``[batch, position]``: neither visual nor padding, and each sample's last token whatever it is.

    That is where the logits of a pruned model are defined.
    """
    attended = _attended(inputs)
    last = attended & (attended.flip(1).cumsum(1).flip(1) == 1)
    return (~visual_positions(model, inputs["input_ids"]) | last) & attended


def operation_masks(
    visual: Tensor,
    strategy: Strategy,
    rankings: Rankings,
    attended: Tensor | None = None,
    length: int | None = None,
    images: Sequence[Sequence[int]] | None = None,
) -> OperationMasks:
    """Spread a strategy over the positions of a batch; DopError if a ranking is not a permutation of the sample's
    visual tokens.

    Args:
        visual: boolean ``[batch, position]``.
        rankings: one permutation of the sample's visual tokens per sample.
        attended: boolean ``[batch, position]``, who is not padding; ``None``: everybody. What is hidden from all is
            in no group, as if it were not there.
        length: positions of the prompt, whose last attended token runs everything; ``None``: all of them.
        images: per sample the visual tokens of each image, for strategies that count per image.
    """
    if len(rankings) != len(visual):
        raise DopError(f"`rankings` needs one entry per sample ({len(visual)}), but got {len(rankings)}")
    runs = torch.from_numpy(strategy.to_array()).to(visual.device)  # [group, layer, module]
    masks = torch.ones(len(MODULES), strategy.num_layers, *visual.shape, dtype=torch.bool, device=visual.device)
    for sample, ranking in enumerate(rankings):
        positions = visual[sample].nonzero()[:, 0]
        order = [int(token) for token in ranking]
        if sorted(order) != list(range(len(positions))):
            raise DopError(
                f"ranking {sample} must be a permutation of the {len(positions)} visual tokens of its sample, "
                f"but got {order}"
            )
        masks[:, :, sample, positions] = False
        present = range(visual.shape[1]) if attended is None else attended[sample].nonzero()[:, 0].tolist()
        last = max(position for position in present if length is None or position < length)
        masks[:, :, sample, last] = True
        first = 0
        for tokens in [len(order)] if images is None or not strategy.per_image else images[sample]:
            ranked = [int(positions[token]) for token in order if first <= token < first + tokens]
            ranked = [position for position in ranked if position in present and position != last]
            first, start = first + tokens, 0
            for group, size in enumerate(strategy.group_sizes(len(ranked))):
                for position in ranked[start : start + size]:
                    masks[:, :, sample, position] = runs[group].T
                start += size
    return OperationMasks(*masks)  # in the order of MODULES


def masked_forward(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    strategy: Strategy,
    rankings: Rankings,
    length: int | None = None,
    images: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Logits ``[batch, position, vocabulary]`` of the masked dense model.

    They are defined at :func:`text_positions`. At visual and padded positions they are finite and mean nothing.

    Args:
        model: a transformers model of a supported family with ``sdpa`` or ``eager`` attention.
        inputs: keyword arguments of ``model``, with ``input_ids``; without a cache.
        strategy: which operations run.
        rankings, length, images: see :func:`operation_masks`.

    Raises:
        StrategyError: if the strategy is for another number of layers.
        DopError: if a ranking does not fit its sample, or the model is pruned right now.
        UnsupportedModelError: if the attention backend takes no 4-D mask.
    """
    num_layers = len(_decoder_layers(model))
    if strategy.num_layers != num_layers:
        raise StrategyError(f"the strategy is for {strategy.num_layers} layers, but the model has {num_layers}")
    visual = visual_positions(model, inputs["input_ids"])
    return logits_under(model, inputs, operation_masks(visual, strategy, rankings, _attended(inputs), length, images))


def logits_under(model: PreTrainedModel, inputs: dict[str, Tensor], masks: OperationMasks) -> Tensor:
    """As :func:`masked_forward`, for operations of any positions."""
    images = _images(model, inputs)
    with torch.no_grad(), _masking(_decoder_layers(model), masks, _attended(inputs), images):
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def masked_generate(
    model: PreTrainedModel, inputs: dict[str, Tensor], strategy: Strategy, rankings: Rankings, max_new_tokens: int
) -> list[list[int]]:
    """Greedy answers of the masked dense model: a full forward over prompt and answer for every new token.

    No cache, no end-of-sequence handling: exactly ``max_new_tokens`` tokens per sample. Visual placeholder tokens and
    ``generation_config.suppress_tokens`` are never produced.
    """
    inputs = dict(inputs)
    suppressed = [*visual_token_ids(model), *(model.generation_config.suppress_tokens or [])]
    length = inputs["input_ids"].shape[1]
    for _ in range(max_new_tokens):
        scores = masked_forward(model, inputs, strategy, rankings, length)[:, -1]
        scores[:, suppressed] = -torch.inf
        inputs = append_tokens(inputs, scores.argmax(dim=-1)[:, None])
    answers: list[list[int]] = inputs["input_ids"][:, length:].tolist()
    return answers


def append_tokens(inputs: dict[str, Tensor], tokens: Tensor) -> dict[str, Tensor]:
    """The same prompt with text ``tokens`` ``[batch, new]`` after it."""
    result = dict(inputs)
    result["input_ids"] = torch.cat([inputs["input_ids"], tokens], dim=1)
    for name, value in (("attention_mask", 1), ("mm_token_type_ids", 0), ("token_type_ids", 0)):
        if name in inputs:
            new = torch.full(tokens.shape, value, dtype=inputs[name].dtype, device=tokens.device)
            result[name] = torch.cat([inputs[name], new], dim=1)
    return result


def _attended(inputs: dict[str, Tensor]) -> Tensor:
    mask = inputs.get("attention_mask")
    return torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def _images(model: PreTrainedModel, inputs: dict[str, Tensor]) -> Tensor | None:
    """Which image each token is part of, -1 for text (``[batch, position]``); ``None``: none sees what comes later."""
    types = inputs.get("token_type_ids")
    if getattr(model.config.get_text_config(), "use_bidirectional_attention", None) == "vision":  # Gemma 4
        types = inputs["mm_token_type_ids"]
    if types is None:
        return None
    numbers = [[-1] * inputs["input_ids"].shape[1] for _ in inputs["input_ids"]]
    for row, kinds in zip(numbers, (types > 0).tolist(), strict=True):
        number = 0
        for place, is_image in enumerate(kinds):
            if is_image:
                row[place] = number
            elif place and kinds[place - 1]:
                number += 1
    return torch.tensor(numbers, device=inputs["input_ids"].device)


def _decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    decoder = decoder_of(model)
    if "forward" in vars(decoder):
        raise DopError("the model is pruned; the reference needs the plain model, so leave `pruned(...)` first")
    backend = model.config.get_text_config()._attn_implementation
    if backend not in ("sdpa", "eager"):
        raise UnsupportedModelError(f"the reference needs `sdpa` or `eager` attention, but the model has {backend!r}")
    layers = decoder.get_submodule("layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def _visible(
    kv: Tensor, attended: Tensor, window: int | None = None, images: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Which keys each query may see in one layer, and which queries see any.

    Args:
        kv: boolean ``[batch, position]``, who offers a key.
        attended: boolean ``[batch, position]``, who is not padding.
        window: how far back the layer sees.

    Returns:
        Boolean ``[batch, 1, query, key]``, rows without any key opened to themselves (softmax over nothing is NaN),
        and boolean ``[batch, query]``, ``False`` for exactly those rows.
    """
    length = kv.shape[1]
    pattern = torch.ones(length, length, dtype=torch.bool, device=kv.device).tril()[None]
    if images is not None:
        pattern = pattern | ((images[:, :, None] == images[:, None, :]) & (images >= 0)[:, :, None])
    if window is not None:
        place = torch.arange(length, device=kv.device)
        pattern = pattern & (place[:, None] - place[None, :] < window)
    visible = pattern & (kv & attended)[:, None, :]
    sees_any = visible.any(dim=-1)
    itself = torch.eye(length, dtype=torch.bool, device=kv.device)
    return (visible | (itself & ~sees_any[:, :, None]))[:, None], sees_any


@contextmanager
def _masking(
    layers: nn.ModuleList, masks: OperationMasks, attended: Tensor, images: Tensor | None = None
) -> Iterator[None]:
    """Hide what is skipped while the context is open."""
    with ExitStack() as stack:
        for index, layer in enumerate(layers):
            parts = dict(layer.named_children())
            mlp = parts["feed_forward" if "feed_forward" in parts else "mlp"]
            if "router" in parts:  # Gemma 4: with the experts that are beside it
                mlp = parts["post_feedforward_layernorm"]
            handles = [mlp.register_forward_hook(_hide(masks.mlp[index]))]
            recurrent = parts.get("linear_attn", parts.get("conv"))
            if recurrent is not None:
                hook = _recur(masks.q[index] & attended, masks.kv[index] & attended)
                handles.append(recurrent.register_forward_hook(hook, with_kwargs=True))
            else:
                attention = parts["self_attn"]
                window = getattr(attention, "sliding_window", None)
                everywhere = getattr(attention.config, "use_bidirectional_attention", None) != "vision"
                whole = images if everywhere or window is not None else None  # Gemma 4: in windows alone
                visible, sees_any = _visible(masks.kv[index], attended, window, whole)
                handles += [
                    attention.register_forward_pre_hook(_replace_mask(visible), with_kwargs=True),
                    attention.register_forward_hook(_hide(masks.q[index] & sees_any)),
                ]
            for handle in handles:
                stack.callback(handle.remove)
        yield


def _replace_mask(visible: Tensor) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if "attention_mask" not in kwargs:
            raise UnsupportedModelError(f"{type(module).__name__} is not called with `attention_mask=`")
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        mask = torch.zeros(visible.shape, dtype=hidden.dtype, device=hidden.device)
        return args, {**kwargs, "attention_mask": mask.masked_fill(~visible, -torch.inf)}

    return hook


def _hide(runs: Tensor) -> Callable[..., Any]:
    """Replaces what a module returns (attention: first of several) where it does not run."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        first, *others = output if isinstance(output, tuple) else (output,)
        hidden = first.masked_fill(~runs[:, :, None], 0.0)
        return (hidden, *others) if isinstance(output, tuple) else hidden

    return hook


def _recur(reads: Tensor, updates: Tensor) -> Callable[..., Tensor]:
    """What ``reads`` get from a recurrence that sees the tokens ``updates`` (both ``[batch, position]``)."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        hidden: Tensor = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        recur = _short_convolution if hasattr(module, "conv") else _delta_net
        answers = torch.stack([recur(module, tokens, learn) for tokens, learn in zip(hidden, updates, strict=True)])
        return answers.masked_fill(~reads[:, :, None], 0.0)

    return hook


def _looking_back(features: Tensor, learns: Tensor, taps: Tensor) -> Tensor:
    """A causal convolution with ``taps [features, num_taps]`` over the tokens that ``learns [position]`` names: each
    token's own features and, before them, those of the last that have learnt."""
    width = taps.shape[1] - 1
    known = torch.cat([features.new_zeros(width, features.shape[1]), features[learns]])
    places = (learns.cumsum(0) - learns.long())[:, None] + torch.arange(width, device=features.device)
    windows = torch.cat([known[places], features[:, None]], dim=1)
    return (windows * taps.T).sum(dim=1)


def _short_convolution(module: Any, tokens: Tensor, learns: Tensor) -> Tensor:
    """As :func:`_delta_net`, of LFM2's short convolution (arXiv 2511.23404, section 2): ``o = W (C * conv(B * x))``."""
    before, after, features = module.in_proj(tokens).chunk(3, dim=-1)
    mixed = _looking_back(before * features, learns, module.conv.weight[:, 0])
    if module.conv.bias is not None:
        mixed = mixed + module.conv.bias
    answers: Tensor = module.out_proj(after * mixed)
    return answers


def _delta_net(module: Any, tokens: Tensor, learns: Tensor) -> Tensor:
    """What a gated delta net answers, token by token, by the equations of the paper (arXiv 2412.06464, eq. 10):
    ``S' = S exp(g)``, ``S' += k (v - k S')^T beta``, ``o = q S'``.

    Args:
        module: the layer's gated delta net.
        tokens: ``[position, hidden_size]``, normed.
        learns: ``[position]``; the others read the state that these have left.
    """
    mixed = nn.functional.silu(_looking_back(module.in_proj_qkv(tokens), learns, module.conv1d.weight[:, 0]))
    query, key, value = mixed.split([module.key_dim, module.key_dim, module.value_dim], dim=-1)
    repeats, count = module.num_v_heads // module.num_k_heads, len(tokens)
    query, key = (
        (part / (part.square().sum(-1, keepdim=True) + 1e-6).sqrt()).repeat_interleave(repeats, dim=1)
        for part in (query.view(count, module.num_k_heads, -1), key.view(count, module.num_k_heads, -1))
    )
    value = value.view(count, module.num_v_heads, -1)
    decay = torch.exp(-module.A_log.exp() * nn.functional.softplus(module.in_proj_a(tokens) + module.dt_bias))
    rate = module.in_proj_b(tokens).sigmoid()
    state = tokens.new_zeros(module.num_v_heads, module.head_k_dim, module.head_v_dim)
    answers = []
    for q, k, v, g, beta, learn in zip(query, key, value, decay, rate, learns.tolist(), strict=True):
        if learn:
            state = state * g[:, None, None]
            change = (v - (k[:, None] @ state)[:, 0]) * beta[:, None]
            state = state + k[:, :, None] @ change[:, None]
        answers.append((q[:, None] @ state)[:, 0])
    gate = module.in_proj_z(tokens).view(count, module.num_v_heads, -1)
    found: Tensor = module.out_proj(module.norm(torch.stack(answers) / module.head_k_dim**0.5, gate).flatten(1))
    return found
