"""LLaVA with a tower that is neither CLIP nor SigLIP: what selectors see is what the tower itself computed."""

from __future__ import annotations

import pytest
import torch
from support.tiny_inputs import tiny_sample
from transformers import AutoModelForImageTextToText, Dinov2Config, LlamaConfig, LlavaConfig

import dop_search as dop
from dop_search.models import adapter_for
from dop_search.pruning.packed import Tokens
from dop_search.testing.inputs import collate
from dop_search.testing.models import randomize_
from dop_search.testing.reference import masked_forward, text_positions
from dop_search.testing.sizes import IMAGE_TOKEN_ID, TinySizes
from dop_search.utils.errors import UnsupportedModelError


def dino_llava(attention: str = "sdpa", **fields):
    vision = Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=7, mlp_ratio=2
    )
    config = LlavaConfig(
        vision_config=vision.to_dict(),
        text_config=LlamaConfig(**TinySizes().text()).to_dict(),
        image_token_index=IMAGE_TOKEN_ID,
        **fields,
    )
    model = AutoModelForImageTextToText.from_config(config, attn_implementation=attention)
    randomize_(model, seed=0)
    return model.eval()


@pytest.mark.parametrize("layer", [-2, 3])
def test_attention_is_that_of_dinov2(layer):
    model = dino_llava(vision_feature_layer=layer)
    inputs = collate([tiny_sample(model, 3, 4, seed=0), tiny_sample(model, 2, 3, seed=1)])
    with torch.no_grad():
        tower = dino_llava("eager").model.vision_tower
        weights = tower(inputs["pixel_values"], output_attentions=True).attentions[layer if layer < 0 else layer - 1]
    mean = weights.mean(dim=1)  # [images, query, key], the CLS token first
    expected = {"cls_attention": mean[:, 0, 1:], "received_attention": mean[:, 1:, 1:].mean(dim=1)}
    adapter, seen = adapter_for(model), {}
    for name in expected:
        handle = adapter.capture(name, lambda values, name=name: seen.update({name: values}))
        adapter.vision_watch.open()
        with torch.no_grad():
            model(**inputs)
        adapter.vision_watch.remove()
        handle.remove()
        torch.testing.assert_close(seen[name], expected[name].flatten())


@pytest.mark.parametrize("selector", ["cls_attention", "received_attention", "uniform_grid", "divprune"])
def test_dinov2_is_pruned_as_the_reference_is(selector):
    model = dino_llava()
    inputs = collate([tiny_sample(model, 3, 4, seed=0), tiny_sample(model, 2, 3, seed=1)])
    strategy = dop.Strategy.depthwise(4, 3, 3, 2, num_visual_tokens=5, selector=selector)
    with torch.no_grad(), dop.pruned(model, strategy):
        logits = model(**inputs).logits
    source = dop.pruning.ranking.RankingSource(adapter_for(model), dop.selectors.make_selector(selector))
    try:
        with torch.no_grad():
            model(**inputs)
            embeds = model.model.get_input_embeddings()(inputs["input_ids"])
            features = adapter_for(model).encode_images(inputs["pixel_values"])
            visual = inputs["input_ids"] == IMAGE_TOKEN_ID
            embeds[visual] = features.flatten(0, -2)
            source.prepare(Tokens(embeds, inputs["input_ids"], visual))
            rankings = source.rank([16, 16])
    finally:
        source.close()
    expected = masked_forward(model, inputs, strategy, rankings)
    text = text_positions(model, inputs)
    assert (logits[text] - expected[text]).abs().max() <= 2e-5 * expected.abs().max()


def test_what_dinov2_does_not_give_is_refused_once():
    model = dino_llava()
    with pytest.raises(UnsupportedModelError, match=r"'dinov2'.*uniform_grid, random, divprune"):
        dop.prune_(model, dop.Strategy.full(4, num_visual_tokens=5, selector="visionzip"))
