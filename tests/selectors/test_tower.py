"""What a vision tower shows, and the two selectors that change what it computes, on the bundled model's tower."""

import itertools
from functools import partial

import numpy as np
import pytest
import slow_selection as slow
import torch
from support.tiny_inputs import tiny_sample
from support.tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import dop_search as dop
from dop_search.divergence.encoding import encode
from dop_search.models import adapter_for
from dop_search.models.capture import TOWER_FIELDS, attention_flops, capture_field, mlp_flops
from dop_search.models.prompts import model_inputs
from dop_search.selectors import make_selector
from dop_search.selectors.flowcut import num_leaving
from dop_search.selectors.resize import grid_cells, smaller_grid
from dop_search.selectors.tome import merge_schedule
from dop_search.testing.inputs import collate
from dop_search.utils.errors import DopError, UnsupportedModelError


@pytest.fixture(scope="module")
def pixels(pocket, few_samples):
    return model_inputs(pocket.processor, few_samples.samples[:2], torch.device("cpu"))["pixel_values"]


def eager(tower, pixels, **kwargs):
    implementation = tower.config._attn_implementation
    try:
        tower.set_attn_implementation("eager")
        with torch.inference_mode():
            return tower(pixels, output_attentions=True, output_hidden_states=True, **kwargs)
    finally:
        tower.set_attn_implementation(implementation)


def test_captures_equal_what_the_eager_tower_reports(pocket, few_samples, pixels):
    view, captured = pocket.adapter.tower_view, {}
    names = {*TOWER_FIELDS, "cls_attention@0", "cls_attention@0.25", "global_attention@middle", "received_attention@-1"}
    handles = [pocket.adapter.capture(name, partial(captured.__setitem__, name)) for name in names]
    try:
        with torch.inference_mode():
            pocket.model(**model_inputs(pocket.processor, few_samples.samples[:2], torch.device("cpu")))
    finally:
        for handle in handles:
            handle.remove()
    out = eager(view.module, pixels)
    layer = pocket.model.config.vision_feature_layer
    shown = {name: values.view(2, 256, -1) for name, values in captured.items()}
    assert set(shown) == names
    close = {"rtol": 1e-4, "atol": 1e-6}
    torch.testing.assert_close(shown["cls_attention"][..., 0], out.attentions[layer].mean(dim=1)[:, 0, 1:], **close)
    torch.testing.assert_close(shown["cls_attention@0"][..., 0], out.attentions[0].mean(dim=1)[:, 0, 1:], **close)
    quarter = out.attentions[0].mean(dim=1)[:, 0, 1:]  # of five layers the first is a quarter up, the second the middle
    torch.testing.assert_close(shown["cls_attention@0.25"][..., 0], quarter, **close)
    for name, which in (("global_attention", layer), ("global_attention@middle", 1)):
        everyone = out.attentions[which].mean(dim=(1, 2))[:, 1:]  # the CLS token asks, too
        torch.testing.assert_close(shown[name][..., 0], everyone, **close)
    received = out.attentions[layer][:, :, 1:].mean(dim=(1, 2))[:, 1:]  # the CLS token does not ask
    torch.testing.assert_close(shown["received_attention"][..., 0], received, **close)
    received = out.attentions[-1][:, :, 1:].mean(dim=(1, 2))[:, 1:]
    torch.testing.assert_close(shown["received_attention@-1"][..., 0], received, **close)
    torch.testing.assert_close(shown["features"], out.hidden_states[layer][:, 1:], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(shown["cls_feature"][:, 7], out.hidden_states[layer][:, 0], rtol=1e-4, atol=1e-4)
    with torch.inference_mode():
        states = view.module.post_layernorm(out.hidden_states[layer][:, 1:])
    torch.testing.assert_close(shown["patch_states"], states, rtol=1e-4, atol=1e-4)
    attention = view.layers[-1].self_attn
    with torch.inference_mode():
        normed = view.layers[-1].layer_norm1(out.hidden_states[-2])
        query, key = (slow.array(project(normed)) for project in (attention.q_proj, attention.k_proj))
    scores = np.einsum("bc,bnc->bn", query[:, 0], key) / np.sqrt(128)
    weights = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(shown["last_cls_attention"][..., 0], weights[:, 1:], rtol=1e-4, atol=1e-7)
    np.testing.assert_allclose(shown["last_keys"], key[:, 1:], rtol=1e-3, atol=1e-5)
    heads = key.reshape(2, 257, 4, 32)
    np.testing.assert_allclose(shown["keys"], heads.mean(axis=2)[:, 1:], rtol=1e-3, atol=1e-5)


def test_a_tower_without_cls_token_says_what_works():
    adapter = adapter_for(tiny_model("llava_onevision"))
    with pytest.raises(UnsupportedModelError, match=r"no CLS token.*attention=received.*uniform_grid"):
        capture_field(adapter, "cls_attention@0", print)


def test_the_projector_works_token_by_token(pocket, pixels):
    """So that features merged after the tower can be projected alone."""
    view = pocket.adapter.tower_view
    with torch.inference_mode():
        features = eager(view.module, pixels).hidden_states[pocket.model.config.vision_feature_layer][:, 1:]
        together = pocket.adapter.encode_images(pixels).view(2, 256, -1)
        torch.testing.assert_close(view.project(features[1, 40:43]), together[1, 40:43], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_kept", [22])
def test_tome_equals_its_definition_head_by_head(pocket, pixels, num_kept):
    view, selector = pocket.adapter.tower_view, make_selector("tome")
    with torch.inference_mode():
        embedded = slow.array(view.module.pre_layrnorm(view.module.embeddings(pixels)))
        patch = selector.patch_tower(pocket.adapter, num_kept)
        try:
            states = view.module(pixels, output_hidden_states=True).hidden_states[-1]
            merged = pocket.adapter.encode_images(pixels).view(2, 256, -1)
        finally:
            patch.restore()
    sizes = patch.run.values["tower_sizes"][..., 0].numpy()
    for image in range(2):
        rows, size, origin = embedded[image], np.ones(257), [[token - 1] for token in range(257)]
        for layer, count in zip(view.layers, merge_schedule(256, num_kept, 5), strict=True):
            rows, size, origin = slow.tome_layer(layer, rows, size, origin, count)
        survivors = {members[0]: (row, number) for members, row, number in zip(origin, rows, size, strict=True)}
        assert set(np.flatnonzero(sizes[image])) == set(survivors) - {-1}
        assert len(survivors) == num_kept + 1
        for token, (row, number) in survivors.items():
            np.testing.assert_allclose(states[image, token + 1], row, rtol=1e-2, atol=2e-3)
            assert token == -1 or sizes[image, token] == number
        assert sizes[image].sum() == 256, "no patch is lost"
    kept = int(np.flatnonzero(sizes[1])[3])
    with torch.inference_mode():
        torch.testing.assert_close(merged[1, kept], view.project(states[1, kept + 1]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_kept", [64, 22])
def test_resizing_equals_the_tower_on_a_small_image(pocket, pixels, num_kept):
    view, selector = pocket.adapter.tower_view, make_selector("resize")
    small = {64: (8, 8), 22: (5, 4)}[num_kept]
    scaled = torch.nn.functional.interpolate(
        pixels, size=(6 * small[0], 6 * small[1]), mode="bicubic", antialias=True, align_corners=False
    )
    patch = selector.patch_tower(pocket.adapter, num_kept)
    try:
        with torch.inference_mode():
            ours = pocket.adapter.encode_images(pixels).view(2, 256, -1)
    finally:
        patch.restore()
    states = eager(view.module, scaled, interpolate_pos_encoding=True).hidden_states[-1][:, 1:]
    _, middles = grid_cells(16, 16, small)
    with torch.inference_mode():
        torch.testing.assert_close(ours[:, middles], view.project(states), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("name", "num_kept"), [("tome", 64), ("resize", 100)])
def test_tower_flops_are_what_a_counter_measures(pocket, pixels, name, num_kept):
    view, selector = pocket.adapter.tower_view, make_selector(name)

    def measured():
        counter = FlopCounterMode(display=False)
        with counter:
            eager(view.module, pixels[:1])
        counts = counter.get_flop_counts()["Global"]
        return sum(flops for operation, flops in counts.items() if "convolution" not in str(operation))

    full = measured()
    patch = selector.patch_tower(pocket.adapter, num_kept)
    try:
        reduced = measured()
    finally:
        patch.restore()
    depth = len(view.layers)
    merged = merge_schedule(256, num_kept, depth) if name == "tome" else (0,) * depth
    counts = np.cumsum([256 if name == "tome" else num_kept, *np.negative(merged)]).tolist()  # before each layer
    assert counts[-1] == num_kept
    assert full == depth * (attention_flops(view, 256) + mlp_flops(view, 256))
    expected = sum(attention_flops(view, n) + mlp_flops(view, m) for n, m in itertools.pairwise(counts))
    matching = 0 if name == "resize" else reduced - expected  # ToMe's own similarities
    assert reduced - matching == expected
    assert 0 <= matching <= 0.05 * full
    assert reduced < full
    assert measured() == full, "restored"


def test_tome_refuses_flash_attention_and_too_few_tokens(pocket, monkeypatch):
    view, selector = pocket.adapter.tower_view, make_selector("tome")
    with pytest.raises(DopError, match="at least 8"):
        selector.patch_tower(pocket.adapter, 7)
    monkeypatch.setattr(view.module.config, "_attn_implementation", "flash_attention_2")
    with pytest.raises(UnsupportedModelError, match=r"flash.*sdpa"):
        selector.patch_tower(pocket.adapter, 64)


@pytest.mark.parametrize("num_kept", [5, 20], ids=["fewer than one image", "more than one image"])
def test_images_of_a_sample_share_the_tokens_of_a_resized_one(num_kept):
    """Against the tower on small images, in a batch with a sample of one image, and through ``generate()``."""
    model = tiny_model("llava")
    tower = model.model.vision_tower
    two, one = tiny_sample(model, 2, 3, seed=1, num_images=2), tiny_sample(model, 2, 3, seed=2)
    strategy = dop.Strategy.full(4, num_visual_tokens=num_kept, selector="resize")
    embeds = []
    for pixels, count in zip(two["pixel_values"], (num_kept - num_kept // 2, num_kept // 2), strict=True):
        a, b = smaller_grid(4, 4, count)
        small = torch.nn.functional.interpolate(
            pixels[None], size=(7 * a, 7 * b), mode="bicubic", antialias=True, align_corners=False
        )
        with torch.no_grad():
            states = tower(small, output_hidden_states=True, interpolate_pos_encoding=True)
            states = states.hidden_states[model.config.vision_feature_layer][:, 1:]
            embeds.append(model.model.multi_modal_projector(states)[0])
    seen = {}
    hook = (
        adapter_for(model)
        .layers[0]
        .input_layernorm.register_forward_pre_hook(lambda module, args: seen.update(rows=args[0]))
    )
    with torch.no_grad(), dop.pruned(model, strategy):
        alone = model(**two).logits[0, -1]
        rows = seen["rows"]
        hook.remove()
        together = model(**collate([two, one])).logits
        first = model.generate(**two, max_new_tokens=1, do_sample=False)[0, -1]
    with torch.no_grad():
        chosen = encode(adapter_for(model), two, (7,), make_selector("resize")).choice(num_kept).embeds
    for tokens in embeds:
        for token in tokens:
            assert float((rows - token).abs().amax(dim=-1).min()) < 1e-4
            assert float((chosen - token).abs().amax(dim=-1).min()) < 1e-4
    torch.testing.assert_close(together[0, -1], alone, rtol=1e-3, atol=1e-4)
    assert int(first) == int(alone.argmax())


@pytest.mark.parametrize("num_kept", [6, 20], ids=["fewer than one image", "more than one image"])
def test_several_images_per_sample_are_refused_by_other_tower_selectors(num_kept):
    model = tiny_model("llava")
    sample = tiny_sample(model, 2, 2, num_images=2)
    strategy = dop.Strategy.full(4, num_visual_tokens=num_kept, selector="tome")
    with torch.no_grad(), dop.pruned(model, strategy), pytest.raises(DopError, match=r"one image per sample \(16.*32"):
        model(**sample)


def test_flowcut_takes_attention_that_is_all_on_one_patch():
    one = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert num_leaving(one, 4, 1) == 2  # an entropy of 0: (4 - 1) / 2, rounded to even
