"""The masked dense reference against facts that need no runtime: it is the oracle of everything else.

Two independent checks: a decoder written out token by token, in which skipped operations do not exist, and the
transformers decoder on a sequence from which dropped tokens were really removed.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.tiny_families import FIRST_OF_ADAPTERS
from support.tiny_inputs import tiny_inputs, tiny_sample
from support.tiny_models import tiny_llava, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from dop_search.models.families import TEXT_MODELS
from dop_search.strategy import Strategy
from dop_search.strategy.operations import MODULES
from dop_search.testing.inputs import Inputs, collate
from dop_search.testing.measure import model_state, state_difference
from dop_search.testing.reference import (
    masked_forward,
    masked_generate,
    operation_masks,
    text_positions,
    visual_positions,
)
from dop_search.testing.strategies import dop_strategies, random_rankings
from dop_search.utils.errors import DopError, StrategyError, UnsupportedModelError

NUM_LAYERS = 4
TOLERANCE = 2e-5

families = pytest.mark.parametrize("family", [*FIRST_OF_ADAPTERS, *TEXT_MODELS])
PROPERTY = settings(max_examples=20, derandomize=True, database=None, deadline=None)


@functools.cache
def model_of(family: str, attn_implementation: str = "sdpa", dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return tiny_model(family, NUM_LAYERS, attn_implementation=attn_implementation, dtype=dtype)


def rankings_of(model: PreTrainedModel, inputs: Inputs, seed: int = 0) -> list[np.ndarray]:
    return random_rankings(visual_positions(model, inputs["input_ids"]).sum(dim=1).tolist(), seed)


def distance(model: PreTrainedModel, inputs: Inputs, logits: Tensor, expected: Tensor) -> float:
    text = text_positions(model, inputs)
    return float((logits - expected)[text].abs().max() / expected[text].abs().max())


def full_logits(model: PreTrainedModel, inputs: Inputs) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def decoder_arguments(model: PreTrainedModel, inputs: Inputs) -> dict[str, Any]:
    """What the model hands its decoder: embeddings, positions, deepstack features."""
    seen: dict[str, Any] = {}

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.update(kwargs)

    handle = model.get_decoder().register_forward_pre_hook(hook, with_kwargs=True)
    full_logits(model, inputs)
    handle.remove()
    if seen.get("inputs_embeds") is None:  # a model of text alone
        seen["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"])
    return seen


# -- a decoder written out, without transformers -----------------------------------------------------------------


def rotate(heads: Tensor, position: int) -> Tensor:
    """RoPE of ``[num_heads, head_dim]`` at one position, base 10000."""
    half = heads.shape[-1] // 2
    angle = position * 10000.0 ** (-torch.arange(half, dtype=heads.dtype) / half)
    first, second = heads[:, :half], heads[:, half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def rms_norm(x: Tensor, norm: Any) -> Tensor:
    return x / (x.pow(2).mean() + norm.variance_epsilon).sqrt() * norm.weight


def written_out_logits(model: PreTrainedModel, embeddings: Tensor, runs: dict[str, np.ndarray]) -> Tensor:
    """Logits ``[position, vocabulary]`` of a Llama decoder, one token at a time; what does not run is not there.

    ``embeddings`` is ``[position, hidden]``, ``runs`` maps a module to a boolean ``[layer, position]``.
    """
    decoder = model.model.language_model
    hidden = list(embeddings)
    for index, layer in enumerate(decoder.layers):
        attention, mlp = layer.self_attn, layer.mlp
        width = attention.head_dim
        normed = [rms_norm(x, layer.input_layernorm) for x in hidden]
        keys, values = {}, {}
        for token in np.flatnonzero(runs["kv"][index]).tolist():
            keys[token] = rotate(attention.k_proj(normed[token]).view(-1, width), token)
            values[token] = attention.v_proj(normed[token]).view(-1, width)
        for token in np.flatnonzero(runs["q"][index]).tolist():
            seen = [key for key in keys if key <= token]
            if not seen:
                continue
            queries = rotate(attention.q_proj(normed[token]).view(-1, width), token)
            heads = []
            for head, query in enumerate(queries):
                kv_head = head * len(keys[seen[0]]) // len(queries)
                scores = torch.stack([query @ keys[key][kv_head] for key in seen]) / width**0.5
                weights = scores.softmax(dim=0)
                heads.append(sum(weight * values[key][kv_head] for weight, key in zip(weights, seen, strict=True)))
            hidden[token] = hidden[token] + attention.o_proj(torch.cat(heads))
        for token in np.flatnonzero(runs["mlp"][index]).tolist():
            x = rms_norm(hidden[token], layer.post_attention_layernorm)
            hidden[token] = hidden[token] + mlp.down_proj(torch.nn.functional.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    logits: Tensor = model.lm_head(torch.stack([rms_norm(x, decoder.norm) for x in hidden]))
    return logits


@settings(PROPERTY, max_examples=10)
@given(
    strategy=dop_strategies(NUM_LAYERS),
    text_before=st.integers(0, 2),
    text_after=st.sampled_from([3, 0]),
    seed=st.integers(0, 5),
)
def test_equals_a_decoder_written_out(strategy: Strategy, text_before: int, text_after: int, seed: int) -> None:
    model = model_of("llava", dtype=torch.float64)
    inputs = tiny_sample(model, text_before, text_after, seed=seed)
    rankings = rankings_of(model, inputs, seed)
    visual = visual_positions(model, inputs["input_ids"])[0].numpy()
    place = np.flatnonzero(visual)
    order = [place[token] for token in rankings[0] if place[token] != len(visual) - 1]  # the last token runs everything
    runs = {module.value: np.ones((NUM_LAYERS, len(visual)), dtype=bool) for module in MODULES}
    for module in MODULES:
        runs[module.value][:, order] = False
        start = 0
        for size, policy in zip(strategy.group_sizes(len(order)), strategy.groups, strict=True):
            for position in order[start : start + size]:
                runs[module.value][list(policy.layers(module)), position] = True
            start += size
    embeddings = decoder_arguments(model, inputs)["inputs_embeds"][0]
    with torch.no_grad():
        expected = written_out_logits(model, embeddings, runs)[None]
    # All in float64, but for RoPE's angles, which transformers keeps in float32.
    assert distance(model, inputs, masked_forward(model, inputs, strategy, rankings), expected) < 1e-5


# -- dropped tokens, really removed from the sequence ------------------------------------------------------------


@pytest.mark.parametrize(
    "family", [name for name in (*FIRST_OF_ADAPTERS, *TEXT_MODELS) if not name.startswith("gemma")]
)  # windows count what left
@pytest.mark.parametrize("num_kept", [0, 1, 6])
def test_dropped_tokens_might_as_well_be_removed(family: str, num_kept: int) -> None:
    """``num_visual_tokens`` alone: the plain decoder on the shorter sequence, with the original positions."""
    model = model_of(family)
    inputs = tiny_sample(model, 3, 5, seed=1)
    (ranking,) = rankings_of(model, inputs)
    strategy = Strategy.full(NUM_LAYERS, num_visual_tokens=num_kept)
    logits = masked_forward(model, inputs, strategy, [ranking])

    visual = visual_positions(model, inputs["input_ids"])[0]
    kept_visual = torch.zeros(len(ranking), dtype=torch.bool)
    kept_visual[ranking[:num_kept].tolist()] = True
    keep = ~visual
    keep[visual] = kept_visual
    arguments = decoder_arguments(model, inputs)
    positions = arguments["position_ids"]
    positions = torch.arange(len(visual))[None] if positions is None else positions
    # Without a mask, transformers takes gaps in the positions for the borders of packed sequences.
    extra: dict[str, Any] = {"attention_mask": torch.ones(1, int(keep.sum()), dtype=torch.long)}
    if "deepstack_visual_embeds" in arguments:
        extra["visual_pos_masks"] = arguments["visual_pos_masks"][:, keep]
        extra["deepstack_visual_embeds"] = [x[kept_visual] for x in arguments["deepstack_visual_embeds"]]
    with torch.no_grad():
        hidden = model.get_decoder()(
            inputs_embeds=arguments["inputs_embeds"][:, keep],
            position_ids=positions[..., keep],
            use_cache=False,
            **extra,
        ).last_hidden_state
        expected = model.lm_head(hidden)
    text_of_kept = ~visual[keep]
    difference = (logits[:, ~visual] - expected[:, text_of_kept]).abs().max() / expected.abs().max()
    assert difference < TOLERANCE
    if num_kept < len(ranking):
        assert distance(model, inputs, logits, full_logits(model, inputs)) > 500 * TOLERANCE


# -- facts of the definition ----------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_full_strategy_is_the_full_model(family: str, backend: str) -> None:
    model = model_of(family, backend)
    inputs = tiny_inputs(model, image_shapes=(2, 1))
    logits = masked_forward(model, inputs, Strategy.full(NUM_LAYERS), rankings_of(model, inputs))
    assert distance(model, inputs, logits, full_logits(model, inputs)) < TOLERANCE


@families
def test_every_live_operation_counts_and_no_dead_one(family: str) -> None:
    """Skip one operation at a time: only ``q`` and ``mlp`` of the last layer change nothing (exactly nothing)."""
    model = model_of(family)
    inputs = tiny_inputs(model)
    rankings = rankings_of(model, inputs)
    full = masked_forward(model, inputs, Strategy.full(NUM_LAYERS), rankings)
    text = text_positions(model, inputs)
    for layer in range(NUM_LAYERS):
        for index, module in enumerate(MODULES):
            runs = np.ones((1, NUM_LAYERS, len(MODULES)), dtype=np.bool_)
            runs[0, layer, index] = False
            logits = masked_forward(model, inputs, Strategy.from_array(runs), rankings)
            if layer == NUM_LAYERS - 1 and module.value != "kv":
                assert torch.equal(logits[text], full[text])
            else:
                assert distance(model, inputs, logits, full) > 500 * TOLERANCE, (layer, module)


@families
def test_batch_equals_singles(family: str) -> None:
    """Padding on the left, another number of visual tokens beside it: neither changes a sample."""
    model = model_of(family)
    samples = [tiny_sample(model, 3, 4, seed=1, image_shape=2), tiny_sample(model, 5, 7, seed=2, image_shape=1)]
    batch = collate(samples)
    strategy = Strategy.depthwise(NUM_LAYERS, [3, 1], [4, 2], [1, 2], num_visual_tokens=9, shares=[0.25, 0.75])
    rankings = rankings_of(model, batch)
    together = masked_forward(model, batch, strategy, rankings)
    for index, sample in enumerate(samples):
        alone = masked_forward(model, sample, strategy, rankings[index : index + 1])
        part = together[index : index + 1, -alone.shape[1] :]
        assert distance(model, sample, part, alone) < TOLERANCE


@families
def test_generation_with_the_full_strategy_is_greedy_generate(family: str) -> None:
    model = model_of(family)
    inputs = tiny_inputs(model)
    expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, -6:].tolist()
    assert masked_generate(model, inputs, Strategy.full(NUM_LAYERS), rankings_of(model, inputs), 6) == expected
    few = Strategy.depthwise(NUM_LAYERS, 1, 1, 1, num_visual_tokens=2)
    assert masked_generate(model, inputs, few, rankings_of(model, inputs), 6) != expected


def test_groups_follow_the_ranking() -> None:
    """Two groups of 1 and 3 tokens by rank, the other two tokens dropped; text keeps everything."""
    visual = torch.tensor([[False, True, True, True, True, True, True, False]])
    strategy = Strategy.depthwise(2, q=[2, 0], kv=[2, 1], mlp=[1, 1], num_visual_tokens=4, shares=[0.25, 0.75])
    masks = operation_masks(visual, strategy, [np.array([3, 0, 5, 1, 2, 4])])
    # token by token:         text  0  1  2  3  4  5  text
    assert masks.q.int().tolist() == [[[1, 0, 0, 0, 1, 0, 0, 1]], [[1, 0, 0, 0, 1, 0, 0, 1]]]
    assert masks.kv.int().tolist() == [[[1, 1, 1, 0, 1, 0, 1, 1]], [[1, 0, 0, 0, 1, 0, 0, 1]]]
    assert masks.mlp.int().tolist() == [[[1, 1, 1, 0, 1, 0, 1, 1]], [[1, 0, 0, 0, 0, 0, 0, 1]]]


def test_two_images_are_ranked_together() -> None:
    """The ranking runs over all visual tokens of a sample, in sequence order."""
    model = model_of("llava")
    inputs = tiny_sample(model, 3, 4, num_images=2)
    visual = visual_positions(model, inputs["input_ids"])
    assert int(visual.sum()) == 32
    second_image_only = np.concatenate([np.arange(16, 32), np.arange(16)])
    masks = operation_masks(visual, Strategy.full(NUM_LAYERS, num_visual_tokens=16), [second_image_only])
    assert masks.kv[0, 0].nonzero()[:, 0].tolist() == [0, 1, 2, 19, 20, *range(21, 41)]


# -- misuse, and leaving nothing behind ------------------------------------------------------------------------------


def test_model_is_left_as_it_was() -> None:
    model = tiny_llava()
    inputs = tiny_inputs(model)
    before = model_state(model)
    masked_forward(model, inputs, Strategy.depthwise(NUM_LAYERS, 1, 1, 1), rankings_of(model, inputs))
    rankings, broken = rankings_of(model, inputs), {**inputs, "pixel_values": inputs["pixel_values"][:1]}
    with pytest.raises(ValueError, match="do not match"):
        masked_forward(model, broken, Strategy.full(NUM_LAYERS), rankings)
    assert state_difference(before, model_state(model)) == []


def test_state_difference_sees_patches() -> None:
    """The comparison that the conformance suite relies on can fail."""
    model = tiny_llava()
    before = model_state(model)
    decoder = model.model.language_model
    decoder.forward = decoder.forward
    handle = decoder.layers[0].mlp.register_forward_hook(lambda *_: None)
    model.config.text_config.rms_norm_eps = 0.5
    differences = state_difference(before, model_state(model))
    assert "model.language_model:forward" in differences
    assert "model.language_model.layers.0.mlp:_forward_hooks" in differences
    assert "config" in differences
    handle.remove()
    del decoder.forward


def test_misuse_is_refused() -> None:
    model = tiny_llava()
    inputs = tiny_sample(model)
    ranking = np.arange(16)
    with pytest.raises(StrategyError, match="for 5 layers, but the model has 4"):
        masked_forward(model, inputs, Strategy.full(5), [ranking])
    for wrong in ([], [ranking, ranking], [ranking[:-1]], [ranking.clip(1)]):
        with pytest.raises(DopError, match="ranking"):
            masked_forward(model, inputs, Strategy.full(NUM_LAYERS), wrong)
    with pytest.raises(UnsupportedModelError, match="no_such_family"):
        tiny_model("no_such_family")


def test_tiny_models_are_reproducible() -> None:
    """Same seed, same weights; the global random state is left alone."""
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    first, second, other = tiny_llava(seed=1), tiny_llava(seed=1), tiny_llava(seed=2)
    assert torch.equal(torch.rand(1), expected)
    inputs = tiny_sample(first)
    assert torch.equal(full_logits(first, inputs), full_logits(second, inputs))
    assert not torch.equal(full_logits(first, inputs), full_logits(other, inputs))
