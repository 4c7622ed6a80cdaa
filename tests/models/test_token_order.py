"""Values of vision patches reach the visual tokens that are made of them, against the model's own features."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from dop_search.models import FAMILIES, adapter_for
from dop_search.models.prompts import chat_prompt
from dop_search.pruning.ranking import RankingSource
from dop_search.selectors import make_selector
from dop_search.testing.models import TINY_CONFIGS, TinySizes, randomize_, tiny_model
from dop_search.testing.processors import drawn_image, drawn_video, tiny_processor

PATCHES_TRIED = 24


def finer_model(family):
    """Any-resolution families with 4 x 4 patches a tile, so that unpadding cuts rows; OneVision resizes them."""
    if family not in ("llava_next", "llava_onevision"):
        return tiny_model(family)
    config = TINY_CONFIGS[family](TinySizes())
    config.vision_config.patch_size = 7
    if family == "llava_onevision":
        config.vision_aspect_ratio = "anyres_max_1"
    model = AutoModelForImageTextToText.from_config(config)
    randomize_(model, seed=0)
    return model.eval()


def features_of(model, arguments, video=False):
    method = model.model.get_video_features if video else model.model.get_image_features
    with torch.no_grad():
        features = method(**arguments, return_dict=True).pooler_output
    return torch.cat([feature.reshape(-1, feature.shape[-1]) for feature in features])


def image_arguments(family):
    images = [drawn_image(60, 22), drawn_image(30, 55, 1), drawn_image(40, 41, 2)]
    batch = tiny_processor(family).image_processor([[image] for image in images], return_tensors="pt")
    names = ("pixel_values", "image_sizes", "image_grid_thw")
    return {name: batch[name] for name in names if name in batch}


def video_arguments(family):
    processor = tiny_processor(family)
    batch = processor.video_processor([drawn_video(4, 24, 40)], return_tensors="pt", return_metadata=False)
    return {name: batch[name] for name in ("pixel_values_videos", "video_grid_thw") if name in batch}


def touched_tokens(model, arguments, video, module, place, patch):
    """Which visual tokens change when one patch of the tower's output does."""
    plain = features_of(model, arguments, video)

    def paint(_module, args, output):
        painted = (args[0] if place == "input" else output).clone(memory_format=torch.contiguous_format)
        painted.view(-1, painted.shape[-1])[patch, 0] += 5.0  # one channel: a LayerNorm undoes a constant
        return (painted, *args[1:]) if place == "input" else painted

    if place == "input":
        handle = module.register_forward_pre_hook(lambda m, args: paint(m, args, None))
    else:
        handle = module.register_forward_hook(paint)
    try:
        changed = (features_of(model, arguments, video) - plain).abs().amax(dim=-1) > 1e-6
    finally:
        handle.remove()
    return changed


CASES = [(family, False) for family in FAMILIES] + [(f, True) for f in ("llava_onevision", "qwen2_5_vl", "qwen3_vl")]


@pytest.mark.parametrize(("family", "video"), CASES)
def test_a_painted_patch_is_found_where_its_feature_went(family, video):
    model = finer_model(family)
    adapter = adapter_for(model)
    arguments = video_arguments(family) if video else image_arguments(family)
    cls = 0
    if hasattr(model.model, "visual"):
        module, place, tower = model.model.visual.merger, "input", model.model.visual.blocks[-1]
    elif family == "internvl":  # its projector comes after the pixel shuffle
        module = tower = model.model.vision_tower.encoder.layer[-1]
        place, cls = "output", 1
    else:
        module, place = model.model.multi_modal_projector, "input"
        tower = model.model.vision_tower.encoder.layers[0]

    shapes = []
    with tower.register_forward_hook(lambda m, args, output: shapes.append(output.shape)):
        adapter.vision_watch.open()
        features = features_of(model, arguments, video)
        adapter.vision_watch.remove()
    shape = shapes[0] if len(shapes[0]) == 3 else (1, *shapes[0])
    has_cls = family in ("llava", "llava_next", "internvl")
    tiles, patches = shape[0], shape[1] - has_cls
    newline = torch.zeros(len(features), dtype=torch.bool)
    if family in ("llava_next", "llava_onevision"):
        newline = (features - model.model.image_newline).abs().amax(dim=-1) < 1e-6
        assert newline.any()

    landed = torch.zeros(len(features), dtype=torch.bool)
    for patch in np.random.default_rng(0).permutation(tiles * patches)[:PATCHES_TRIED].tolist():
        values = torch.zeros(tiles, patches, 2)
        values.view(-1, 2)[patch] = torch.tensor([1.0, 3.0])
        tokens = adapter.to_token_order(values)
        assert tokens.shape == (len(features), 2)
        torch.testing.assert_close(tokens[:, 1], 3 * tokens[:, 0])
        row = patch if not cls else patch // patches * (patches + 1) + cls + patch % patches
        expected = touched_tokens(model, arguments, video, module, place, row)
        assert torch.equal((tokens[:, 0].abs() > 1e-6)[~newline], expected[~newline])
        landed |= expected
    assert landed.sum() > 5
    # A constant stays one everywhere, newline tokens included: every token is a weighted mean of patches.
    torch.testing.assert_close(
        adapter.to_token_order(torch.ones(tiles, patches, 1)), torch.ones(len(features), 1), atol=1e-5, rtol=0
    )


def test_newline_tokens_get_the_mean_of_their_row():
    model = finer_model("llava_next")
    adapter, arguments = adapter_for(model), image_arguments("llava_next")
    adapter.vision_watch.open()
    features = features_of(model, arguments)
    adapter.vision_watch.remove()
    newline = (features - model.model.image_newline).abs().amax(dim=-1) < 1e-6
    values = torch.rand(sum(adapter.tiles_per_image(adapter.vision_watch.current())), 16, 1)
    tokens, start = adapter.to_token_order(values)[:, 0], 16  # behind the base view of the first image
    for end in newline.nonzero()[:2, 0].tolist():
        assert tokens[end] == pytest.approx(tokens[start:end].mean().item())
        start = end + 1


@pytest.mark.parametrize("family", FAMILIES)
def test_received_attention_is_what_the_eager_tower_computes(family, monkeypatch):
    """Against the full attention maps that transformers' own eager function returns."""
    model = tiny_model(family, attn_implementation="eager")
    adapter = adapter_for(model)
    attention = adapter.received_attention_module()
    module = sys.modules[type(attention).__module__]
    original, maps = module.eager_attention_forward, []

    def recording(called, *args, **kwargs):
        output = original(called, *args, **kwargs)
        if called is attention:
            maps.append(output[1])
        return output

    monkeypatch.setattr(module, "eager_attention_forward", recording)
    received = []
    handle = adapter.capture_received_attention(received.append)
    processor = tiny_processor(family)
    images = [[drawn_image(56, 40)], [drawn_image(30, 70, 1)]]
    batch = processor(images=images, text=[chat_prompt(processor, "What?")] * 2, padding=True, return_tensors="pt")
    try:
        with torch.no_grad():
            model(**batch)
        first = int(family in ("llava", "llava_next", "internvl"))  # the CLS token neither asks nor is ranked
        means = [part.mean(dim=1)[:, first:, first:].mean(dim=1) for part in maps]
        expected = adapter.to_token_order(torch.cat(means, dim=1)[..., None])[:, 0]
    finally:
        handle.remove()
    assert len(received) == 1
    torch.testing.assert_close(received[0], expected, atol=1e-6, rtol=1e-5)
    assert received[0].std() > 1e-4


@pytest.mark.parametrize("family", ["llava_next", "internvl"])
def test_cls_attention_is_what_the_eager_tower_computes(family):
    model = tiny_model(family, attn_implementation="eager")
    adapter = adapter_for(model)
    received = []
    handle = adapter.capture_cls_attention(received.append)
    processor = tiny_processor(family)
    batch = processor(images=[drawn_image(56, 40)], text=[chat_prompt(processor, "What?")], return_tensors="pt")
    tiles = []
    seen = model.model.vision_tower.register_forward_pre_hook(
        lambda m, args, kwargs: tiles.append(args[0] if args else kwargs["pixel_values"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**batch)
            seen.remove()
            maps = model.model.vision_tower(tiles[0], output_attentions=True).attentions
        weights = maps[model.config.vision_feature_layer].mean(dim=1)[:, 0, 1:]
        expected = adapter.to_token_order(weights[..., None])[:, 0]
    finally:
        handle.remove()
    torch.testing.assert_close(received[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_scores_of_a_video_and_an_image_stand_where_their_tokens_stand(family):
    """Images are encoded before videos, whatever their order in the prompt."""
    model, processor = tiny_model(family), tiny_processor(family)
    image, video = drawn_image(40, 50), drawn_video(4, 30, 40)
    marks = {
        kind: processor.apply_chat_template([{"role": "user", "content": [{"type": kind}]}])
        for kind in ("image", "video")
    }

    def scores(text, **media):
        source = RankingSource(adapter_for(model), make_selector("received_attention"))
        batch = processor(text=[text], return_tensors="pt", **media)
        batch = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
        try:
            with torch.no_grad():
                model(**batch)
        finally:
            source.close()
        return source.captured["received_attention"], batch["input_ids"][0]

    of_image, _ = scores(marks["image"], images=[image])
    of_video, _ = scores(marks["video"], videos=[video])
    both, ids = scores(marks["video"] + marks["image"] + "?", images=[image], videos=[video])
    visual = ids[torch.isin(ids, torch.tensor([model.config.image_token_id, model.config.video_token_id]))]
    assert visual[0] == model.config.video_token_id
    torch.testing.assert_close(both[visual == model.config.image_token_id], of_image)
    torch.testing.assert_close(both[visual == model.config.video_token_id], of_video)
