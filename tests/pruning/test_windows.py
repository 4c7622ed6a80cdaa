"""Windows and images that are seen as a whole, where the masked reference says nothing: reach, caches, refusals."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from support.tiny_families import TINY_FAMILIES
from support.tiny_inputs import tiny_sample
from support.tiny_models import tiny_model
from transformers import AutoModelForImageTextToText, PreTrainedModel
from transformers.cache_utils import DynamicCache

import dop_search as dop
from dop_search.divergence.encoding import encode, full_states
from dop_search.models import adapter_for
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.testing.inputs import collate, random_text
from dop_search.testing.models import randomize_
from dop_search.testing.reference import append_tokens, masked_forward
from dop_search.testing.sizes import TinySizes
from dop_search.utils.errors import DopError, UnsupportedModelError

IMAGE_TOKENS = 16


@cache
def gemma(num_layers: int = 4) -> Any:
    return tiny_model("gemma3", num_layers)


def logits(model: PreTrainedModel, strategy: Strategy, rankings: list[np.ndarray], **inputs: Any) -> Any:
    with torch.no_grad(), dop.pruned(model, strategy, rankings=rankings):
        return model(**inputs)


def test_a_skipped_token_moves_no_window() -> None:
    """Two layers reach back 2 (window - 1) tokens of what was fed, however few of them are kept."""
    model = tiny_model("gemma3", num_layers=2)
    for layer in adapter_for(model).layers:
        layer.self_attn.sliding_window = 6
    nothing = Strategy.depthwise(2, 0, 0, 0, selector="explicit")
    sample, rankings = tiny_sample(model, 3, 5), [np.arange(IMAGE_TOKENS)]
    changed = {**sample, "input_ids": sample["input_ids"].clone()}
    for place, reaches in ((0, False), (-3, True)):  # places -21 to -6 are the image
        changed["input_ids"][0] = sample["input_ids"][0]
        changed["input_ids"][0, place] += 1
        before, after = (logits(model, nothing, rankings, **inputs).logits[0, -1] for inputs in (sample, changed))
        assert torch.equal(before, after) is not reaches


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_a_cache_of_the_plain_model_is_continued(backend: str) -> None:
    """Its layers with a window hold the last tokens only; nothing of an image that comes later is skipped there."""
    model = tiny_model("gemma3", attn_implementation=backend)
    batch = collate([tiny_sample(model, 3, 4), tiny_sample(model, 5, 7, seed=1)])
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(**batch, past_key_values=cache, use_cache=True)
    assert cache.layers[0].keys.shape[2] < cache.layers[1].keys.shape[2]
    longer = append_tokens(batch, random_text(model, 6, seed=2).view(2, 3))
    with torch.no_grad():
        expected = model(**longer).logits[:, -3:]
    continued = logits(
        model,
        Strategy.depthwise(4, 1, 1, 1, selector="explicit"),
        [np.arange(IMAGE_TOKENS)] * 2,
        input_ids=longer["input_ids"][:, -3:],
        attention_mask=longer["attention_mask"],
        past_key_values=cache,
    ).logits
    torch.testing.assert_close(continued, expected, atol=2e-5, rtol=2e-5)


def test_a_second_image_sees_the_first_through_the_cache() -> None:
    """Two turns with an image each, every operation of the first skipped and all of the second kept, or the reverse."""
    model = gemma()
    both = tiny_sample(model, 3, 4, num_images=2)
    ids, types = both["input_ids"], both["token_type_ids"]
    second = int(types[0].nonzero()[IMAGE_TOKENS]) - 1
    nothing = Strategy.depthwise(4, 0, 0, 0, selector="explicit")
    order = [np.arange(IMAGE_TOKENS)]
    cache = DynamicCache(config=model.config)
    whole = logits(model, nothing, [np.arange(2 * IMAGE_TOKENS)], **both).logits
    parts = [
        logits(
            model,
            nothing,
            order,
            input_ids=ids[:, first:end],
            token_type_ids=types[:, first:end],
            pixel_values=both["pixel_values"][image : image + 1],
            past_key_values=cache,
            use_cache=True,
        ).logits
        for image, (first, end) in enumerate(((0, second), (second, ids.shape[1])))
    ]
    torch.testing.assert_close(parts[1][:, -1], whole[:, -1], atol=2e-5, rtol=2e-5)


def test_the_teacher_is_the_model() -> None:
    """The decoder by itself, with masks of transformers' own, gives the logits of the whole model."""
    model = gemma()
    sample = tiny_sample(model, 3, 4, num_images=2)
    adapter = adapter_for(model)
    encoded = encode(adapter, sample, [7, 8], make_selector("random"))
    with torch.no_grad():
        expected = model(**sample).logits[0]
        found = adapter.lm_head(full_states(adapter, encoded, sample["input_ids"].shape[1]))
    torch.testing.assert_close(found, expected)
    del sample["token_type_ids"]
    with pytest.raises(DopError, match="token_type_ids"):
        encode(adapter, sample, [7, 8], make_selector("random"))


def test_what_goes_by_causal_attention_is_refused() -> None:
    """A prefill in chunks, and selectors that compute the attention of decoder layers by themselves."""
    model = gemma()
    sample = tiny_sample(model)
    skipping = Strategy.depthwise(4, 1, 1, 1, selector="explicit")
    with dop.pruned(model, skipping, rankings=[np.arange(16)]), pytest.raises(DopError, match="prefill_chunk_size"):
        model.generate(**sample, max_new_tokens=1, prefill_chunk_size=8)
    ranking_inside = Strategy.depthwise(
        4, [4, 2], [4, 2], [4, 2], shares=[0.5, 0.5], selector="fastv", selector_options={"stages": [1]}
    )
    with pytest.raises(UnsupportedModelError, match="fastv"), dop.pruned(model, ranking_inside):
        pass


def gemma4(**text: Any) -> Any:
    family = TINY_FAMILIES["gemma4"]
    config = replace(family, text={**family.text, **text}).config("gemma4", TinySizes())
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    randomize_(model, 0)
    return model.eval()


def test_gemma_4_without_experts_causal_and_with_values_of_their_own() -> None:
    model = gemma4(use_bidirectional_attention=None, attention_k_eq_v=False, enable_moe_block=False)
    assert not adapter_for(model).sees_images_whole
    sample = tiny_sample(model, 3, 4)
    order = [np.random.default_rng(0).permutation(70)]
    strategy = Strategy.depthwise(4, 2, 3, 2, num_visual_tokens=20, selector="explicit")
    expected = masked_forward(model, sample, strategy, order)[:, -4:]
    torch.testing.assert_close(logits(model, strategy, order, **sample).logits[:, -4:], expected, atol=2e-5, rtol=2e-5)


def test_gemma_4_that_shares_keys_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"num_kv_shared_layers=2.*hidden_size_per_layer_input=8"):
        adapter_for(gemma4(num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=96))
