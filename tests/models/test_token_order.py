"""Values of vision patches reach the visual tokens that are made of them, against the model's own features."""

from __future__ import annotations

import pytest
import torch
from support.tiny_families import tiny_processor
from support.tiny_models import tiny_config, tiny_model
from transformers import AutoModelForImageTextToText

from dop_search.models import adapter_for
from dop_search.models.prompts import chat_prompt
from dop_search.models.tiles import InternVLAdapter
from dop_search.pruning.ranking import RankingSource
from dop_search.selectors import make_selector
from dop_search.testing.models import randomize_
from dop_search.testing.painting import canvas_of, check_painted_patches
from dop_search.testing.processors import drawn_image, drawn_video
from dop_search.testing.sizes import TinySizes


def finer_model(family):
    """Any-resolution families with 4 x 4 patches a tile, so that unpadding cuts rows; OneVision resizes them."""
    if family not in ("llava_next", "llava_onevision"):
        return tiny_model(family)
    config = tiny_config(family, TinySizes())
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


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_a_painted_patch_is_found_where_its_feature_went(family):
    """On finer grids than the conformance suite has, with images that are padded."""
    model = finer_model(family)
    arguments = image_arguments(family)
    num_tokens = check_painted_patches(model, canvas_of(model), arguments)
    assert len(features_of(model, arguments)) > num_tokens  # newlines


def test_patches_at_other_tokens_are_noticed(monkeypatch):
    """The check can fail: an adapter that takes rows for columns."""
    model = finer_model("internvl")
    shuffled = InternVLAdapter.to_token_order
    monkeypatch.setattr(InternVLAdapter, "to_token_order", lambda self, values: shuffled(self, values).flip(0))
    with pytest.raises(AssertionError, match=r"patch \d+ went to other tokens"):
        check_painted_patches(model, canvas_of(model), image_arguments("internvl"))


def test_newline_tokens_get_the_mean_of_their_row():
    model = finer_model("llava_next")
    adapter, arguments = adapter_for(model), image_arguments("llava_next")
    adapter.vision_watch.open()
    features = features_of(model, arguments)
    adapter.vision_watch.remove()
    newline = (features - model.model.image_newline).abs().amax(dim=-1) < 1e-6
    values = torch.rand(sum(adapter.tiles_per_image(adapter.vision_watch.current())), 16, 1)
    tokens, start = adapter.to_token_order(values)[:, 0], 16  # after the base view of the first image
    for end in newline.nonzero()[:2, 0].tolist():
        assert tokens[end] == pytest.approx(tokens[start:end].mean().item())
        start = end + 1


@pytest.mark.parametrize("family", ["llava_next", "internvl"])
def test_cls_attention_is_what_the_eager_tower_computes(family):
    model = tiny_model(family, attn_implementation="eager")
    adapter = adapter_for(model)
    received = []
    handle = adapter.capture("cls_attention", received.append)
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
