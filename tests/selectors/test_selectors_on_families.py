"""Every selector on every family: it runs and is the same in a batch, or refuses before anything is touched."""

import sys
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from support.tiny_families import tiny_processor
from support.tiny_inputs import tiny_sample
from support.tiny_models import tiny_model
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb_vision

import dop_search as dop
import dop_search.baselines
from dop_search.baselines import FitContext
from dop_search.divergence.encoding import encode
from dop_search.models import adapter_for
from dop_search.models.capture import field_and_layer
from dop_search.models.prompts import chat_prompt
from dop_search.models.qwen2_5_vl import Qwen2_5VLAdapter
from dop_search.pruning.in_decoder import STAGE_SELECTORS
from dop_search.pruning.packed import Tokens
from dop_search.pruning.ranking import RankingSource
from dop_search.selectors import SELECTORS, SelectionSizes, make_selector
from dop_search.selectors.base import at_layer
from dop_search.strategy.operations import TokenCounts
from dop_search.testing.measure import model_state, state_difference
from dop_search.testing.processors import drawn_image
from dop_search.utils.errors import DopError, UnsupportedModelError

TOWERS = ("llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "vipllava")
"""Families whose towers or projectors differ in what selectors see of them."""
HAS_CLS = ("llava", "llava_next", "vipllava", "internvl")
COVERED = ("llava", "llava_next")
"""With a CLS token in a tower that selectors can look into."""
EVERYWHERE = {
    "cdpruner_llm", "divprune", "divprune_lazy", "gprune", "hiprune", "random", "received_attention", "uniform_grid"
}  # fmt: skip
README = Path(dop_search.baselines.__file__).parent / "README.md"
PUBLISHED = {
    "avg_pool": ("qwen2_5_vl", "internvl"),
    "cdpruner": COVERED,
    "cdpruner_llm": ("qwen2_5_vl", "internvl"),
    "cls_attention": (*COVERED, "internvl"),
    "divprune": (*COVERED, "qwen2_5_vl", "internvl"),
    "flowcut": (*COVERED, "qwen2_vl"),
    "gprune": ("llava_next", "qwen2_5_vl", "internvl"),
    "hiprune": (*COVERED, "qwen2_5_vl"),
    "hired": COVERED,
    "holov": (*COVERED, "qwen2_5_vl"),
    "prumerge_plus": (*COVERED, "llava_onevision", "qwen2_vl", "internvl"),
    "prunesid": (*COVERED, "qwen2_vl"),
    "random": ("qwen2_5_vl", "internvl"),
    "scope": (*COVERED, "qwen2_5_vl"),
    "tome": ("llava",),
    "trim": COVERED,
    "vispruner": (*COVERED, "qwen2_5_vl"),
    "visionzip": (*COVERED, "llava_onevision", "qwen2_vl", "qwen2_5_vl", "internvl"),
    "vscan": (*COVERED, "qwen2_5_vl"),
}
"""Families in tables of the papers, or of others that run the methods (EffiVLM-Bench, UniPruneBench, TOPS)."""
NEEDS_CLIP = ("cdpruner", "trim")


@cache
def model_of(family):
    """Has run once: transformers installs hooks of its own in a first forward."""
    model = tiny_model(family)
    with torch.no_grad():
        model(**prompts(family, (0,)))
    return model


def way(family, name):
    """With which option a selector runs on a family, from how it is built; None: not at all. ``clip``: with CLIP's text
    encoder, which none of the tiny models has."""
    covered, merges_late = family in COVERED, family != "qwen3_vl"
    if name in EVERYWHERE or (name in ("avg_pool", "trim_llm") and merges_late):
        return "yes"
    if name == "holov":
        return "yes" if family in HAS_CLS else "received"
    if name in ("scope", "vispruner"):
        return "yes" if covered else "received"
    if name in ("prumerge_plus", "visionzip", "prunesid"):
        late = "loading" if name == "prunesid" else "received"
        return "yes" if covered else late if merges_late else None
    if name == "hired" and family == "llava_onevision":
        return "received"
    if name == "vscan" and family not in HAS_CLS:
        return "received" if merges_late else None
    if name in ("hired", *NEEDS_CLIP) and covered:
        return "clip" if name in NEEDS_CLIP else "yes"
    where = {"cls_attention": HAS_CLS, "vscan": HAS_CLS, "flowcut": (*COVERED, "qwen2_vl")}
    return "yes" if family in where.get(name, ("llava",) if name in ("resize", "tome") else ()) else None


RUNS = [(family, name) for family in TOWERS for name in SELECTORS if way(family, name) not in (None, "clip")]
REFUSED = [(family, name) for family in TOWERS for name in SELECTORS if way(family, name) in (None, "clip")]


def prompts(family, seeds):
    processor = tiny_processor(family)
    images = [[drawn_image(50 + 3 * seed, 40 + 5 * seed, seed)] for seed in seeds]
    texts = [chat_prompt(processor, f"What is in it {seed}?") for seed in seeds]
    batch = processor(text=texts, images=images, padding=True, return_tensors="pt")
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def last_logits(family, inputs, name, options):
    model = model_of(family)
    chosen = dop.Strategy.full(4, num_visual_tokens=5, selector=name, selector_options=options)
    with torch.no_grad(), dop.pruned(model, chosen):
        return model(**inputs).logits[:, -1]


def check_runs(family, name, options=None):
    model, options = model_of(family), options or {}
    before = model_state(model)
    together = last_logits(family, prompts(family, (0, 2)), name, options)
    for row, seed in enumerate((0, 2)):
        alone = last_logits(family, prompts(family, (seed,)), name, options)[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(model(**prompts(family, (0, 2))).logits[:, -1], together, atol=1e-3)
    assert state_difference(before, model_state(model)) == []


@pytest.mark.parametrize(("family", "name"), RUNS)
def test_runs_and_does_not_depend_on_the_batch(family, name):
    options = {"received": {"attention": "received"}, "loading": {"score": "loading"}}
    check_runs(family, name, options.get(way(family, name)))


def test_the_table_of_families_is_what_runs():
    """The README's: with a star what tables of papers have; all of that runs."""
    table = README.read_text().partition("## Where each runs")[2].partition("\n## ")[0]
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("|")]
    families, found = lines[0][1:], {}
    for names, *cells in lines[2:]:
        for name in names.replace("`", "").split(", "):
            found |= {(name, family): cell for family, cell in zip(families, cells, strict=True)}
    expected = {}
    for name in SELECTORS:
        for family in families:
            star = "*" if family in PUBLISHED.get(name, ()) else ""
            expected[name, family] = (way(family, name) or "–") + star
    assert found == expected
    assert "–*" not in found.values()


@pytest.mark.parametrize("family", TOWERS)
def test_methods_that_rank_inside_the_decoder_run_everywhere(family):
    """Whatever the tower and the positions are; a batch of two is two batches of one."""
    model, batch = model_of(family), prompts(family, (0, 2))
    for name in STAGE_SELECTORS:
        depths = [4, 2]
        chosen = dop.Strategy.depthwise(
            4, depths, depths, depths, shares=[0.5, 0.5], selector=name, selector_options={"stages": [1]}
        )
        with torch.no_grad():
            full = model(**batch).logits[:, -1]
            with dop.pruned(model, chosen):
                together = model(**batch).logits[:, -1]
                for row, seed in enumerate((0, 2)):
                    alone = model(**prompts(family, (seed,))).logits[0, -1]
                    torch.testing.assert_close(together[row], alone, rtol=1e-3, atol=1e-4, msg=name)
        assert not torch.allclose(full, together, atol=1e-3), name


def test_layers_of_a_tower_with_windows_attend_to_whole_images():
    """Four of Qwen2.5-VL's 32 blocks do: HiPrune reads the 16th, VScan the 8th; others can be had by their depth."""

    class Adapter(Qwen2_5VLAdapter):
        vision_tower = SimpleNamespace(blocks=list(range(1, 33)), fullatt_block_indexes=[7, 15, 23, 31])
        attention_modules = tuple(range(1, 33))

    adapter = object.__new__(Adapter)
    found = [adapter.attention_module(layer) for layer in ("middle", 0.25, None, 7, -9, 0.1, 0.7)]
    assert found == [16, 8, 32, 8, 24, 8, 16]
    with pytest.raises(UnsupportedModelError, match=r"block 6 of the vision tower.*use a layer of \[7, 15, 23, 31\]"):
        adapter.attention_module(6)
    with pytest.raises(DopError, match=r"-32 <= layer < 32.*but got 32"):
        adapter.attention_module(32)


@pytest.mark.parametrize(("family", "name"), REFUSED)
def test_refuses_what_it_cannot_do_and_leaves_nothing_behind(family, name):
    model = model_of(family)
    before = model_state(model)
    with pytest.raises(UnsupportedModelError, match=r"selector|clip="):
        dop.prune_(model, dop.Strategy.full(4, num_visual_tokens=5, selector=name))
    assert state_difference(before, model_state(model)) == []
    assert adapter_for(model).vision_watch._open == 0


@pytest.mark.parametrize("family", ["llava", "vipllava", "llava_onevision", "internvl", "qwen2_vl", "qwen2_5_vl"])
def test_attention_of_any_layer_is_the_eager_towers(family):
    """By its number and its depth, beside transformers' own maps; it ranks, and costs what the usual layer costs."""
    model, inputs = model_of(family), prompts(family, (0,))
    adapter, maps, shown = adapter_for(model), {}, {}
    modules = adapter.attention_modules
    layer = adapter.tower_layer(0.01)  # the first that attends to whole images
    kinds = ["received_attention", "global_attention", *(["cls_attention"] if adapter.has_cls else [])]
    code = sys.modules[type(modules[0]).__module__]
    eager = code.eager_attention_forward

    def recording(module, *args, **kwargs):
        output = eager(module, *args, **kwargs)
        maps.setdefault(id(module), output[1].mean(dim=1))
        return output

    used = model.config._attn_implementation
    names = [at_layer(kind, layer) for kind in kinds]
    handles = [adapter.capture(name, partial(shown.__setitem__, name)) for name in names]
    code.eager_attention_forward = recording
    try:
        model.set_attn_implementation("eager")
        with torch.no_grad():
            model(**inputs)
            of_tower, cls = maps[id(modules[layer])], int(adapter.has_cls)
            rows = {"cls": of_tower[:, :1], "received": of_tower[:, cls:], "global": of_tower}
            expected = [rows[kind.partition("_")[0]].mean(dim=1)[:, cls:, None] for kind in kinds]
            for name, values in zip(names, expected, strict=True):
                torch.testing.assert_close(shown[name], adapter.to_token_order(values)[:, 0], rtol=1e-4, atol=1e-6)
    finally:
        code.eager_attention_forward = eager
        model.set_attn_implementation(used)
        for handle in handles:
            handle.remove()
    check_runs(family, "received_attention", {"layer": layer})
    usual, other = make_selector("received_attention"), make_selector("received_attention", {"layer": layer})
    sizes = SelectionSizes(16, 5, adapter.dims, adapter.tower_width, 16)
    assert usual.selection_flops(sizes) == other.selection_flops(sizes) > 0
    chosen = dop.Strategy.full(4, num_visual_tokens=5, selector="received_attention", selector_options={"layer": 99})
    with pytest.raises(DopError, match="but got 99"):
        dop.prune_(model, chosen)


@pytest.mark.parametrize("family", ["gemma4", "glm4v", "lfm2_vl", "minicpmv4_6", "mistral3", "video_llama_3"])
def test_without_a_cls_token_all_that_ask_are_the_patches_of_the_image(family):
    """The suite compares what is received with transformers' own maps: several images in a row, padding, windows."""
    adapter, shown = adapter_for(model_of(family)), {}
    kinds = ("received_attention", "global_attention")
    handles = [adapter.capture(kind, partial(shown.__setitem__, kind)) for kind in kinds]
    try:
        with torch.no_grad():
            adapter.model(**prompts(family, (0, 2)))
    finally:
        for handle in handles:
            handle.remove()
    assert shown[kinds[0]].std() > 1e-4
    assert torch.equal(*shown.values())


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_flowcut_leaves_as_many_patches_as_tokens(family):
    """The tower computes no others, and what the engine chooses is what a forward has; images with padding."""
    model, inputs, kept = model_of(family), prompts(family, (1,)), 11
    adapter, rows, seen = adapter_for(model), {}, []
    chosen = dop.Strategy.full(4, num_visual_tokens=kept, selector="flowcut")
    if family == "llava_next":
        last = adapter.tower_view.layers[adapter.tower_view.feature_layer].mlp
        hook = last.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape[1] - 1))
    else:
        last = model.model.visual.blocks[-1].mlp
        hook = last.register_forward_pre_hook(lambda module, args: seen.append(len(args[0]) / 4))
    first = adapter.layers[0].input_layernorm.register_forward_pre_hook(
        lambda module, args: rows.update(hidden=args[0].reshape(-1, args[0].shape[-1]))
    )
    try:
        with torch.no_grad(), dop.pruned(model, chosen):
            model(**inputs)
        patches = sum(seen)
    finally:
        hook.remove()
        first.remove()
    visual = int(adapter.visual_token_mask(inputs["input_ids"]).sum())
    assert len(rows["hidden"]) == inputs["input_ids"].shape[1] - visual + kept
    assert patches == kept if family == "llava_next" else kept < patches <= visual
    with torch.no_grad():
        choice = encode(adapter, inputs, (7,), make_selector("flowcut")).choice(kept)
    assert len(choice.embeds) == kept
    distance = (choice.embeds[:, None] - rows["hidden"]).abs().amax(dim=-1)
    assert float(distance.min(dim=1).values.max()) < 1e-4
    assert set(distance.argmin(dim=1).diff().tolist()) == {1}, "in the order of the sequence"
    if family == "qwen2_vl":
        assert choice.slots.tolist() == list(range(kept)), "as released, in the first places of the image"


@pytest.mark.parametrize("family", ["llava_next", "qwen2_vl"])
def test_flowcut_refuses_several_images(family):
    model = model_of(family)
    sample = tiny_sample(model, 2, 2, num_images=2)
    chosen = dop.Strategy.full(4, num_visual_tokens=5, selector="flowcut")
    with torch.no_grad(), dop.pruned(model, chosen), pytest.raises(DopError, match="one image per sample"):
        model(**sample)


@pytest.mark.parametrize(("method", "family"), [("flowcut_two_stage", "qwen2_vl"), ("vscan_two_stage", "qwen2_5_vl")])
def test_both_stages_run_by_the_methods_name(method, family):
    """Fitted with the model at hand, which says whether its tower has a CLS token."""
    model = model_of(family)
    loaded = SimpleNamespace(adapter=adapter_for(model))
    context = FitContext(loaded.adapter.dims, (TokenCounts(12, 36),), loaded=loaded)
    fitted = dop_search.baselines.baseline(method).fit(context, 0.62)
    with torch.no_grad(), fitted.apply(model):
        logits = model(**prompts(family, (0,))).logits[0, -1]
        assert not torch.allclose(logits, model(**prompts(family, (2,))).logits[0, -1])
    assert fitted.strategy.stages
    assert torch.isfinite(logits).all()


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_features_stand_where_their_tokens_stand(family):
    """Projecting the captured features gives the decoder's input, newline and unpadded tokens aside."""
    model, inputs = model_of(family), prompts(family, (1,))
    adapter, seen = adapter_for(model), {}
    handle = adapter.capture("features", lambda values: seen.update(features=values))
    hook = adapter.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
    finally:
        handle.remove()
        hook.remove()
    embeds = seen["embeds"][adapter.visual_token_mask(inputs["input_ids"])]
    newline = (embeds - model.model.image_newline).abs().amax(dim=-1) < 1e-6
    assert 0 < newline.sum() < len(newline)
    with torch.no_grad():
        projected = model.model.multi_modal_projector(seen["features"])
    torch.testing.assert_close(projected[~newline], embeds[~newline], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["divprune", "uniform_grid", "holov", "avg_pool"])
def test_a_prompt_without_image_in_the_batch(name):
    """It has nothing to choose; the other prompt's choice is what it is alone."""
    model, processor = model_of("llava"), tiny_processor("llava")
    image = drawn_image(50, 40)
    texts = [chat_prompt(processor, "What is in it?"), chat_prompt(processor, "Hello, what is this?", 0)]
    inputs = processor(text=texts, images=[image], padding=True, return_tensors="pt")
    chosen = dop.Strategy.full(4, num_visual_tokens=5, selector=name)
    with torch.no_grad():
        full = model(**inputs).logits[1, -1]
        with dop.pruned(model, chosen):
            logits = model(**inputs).logits[:, -1]
            alone = model(**processor(text=texts[:1], images=[image], return_tensors="pt")).logits[0, -1]
    torch.testing.assert_close(logits[0], alone, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits[1], full, rtol=1e-3, atol=1e-4)


def test_refusals_say_why_and_what_works():
    with pytest.raises(UnsupportedModelError, match=r"Qwen3VL.*after its first layers.*divprune"):
        RankingSource(adapter_for(model_of("qwen3_vl")), make_selector("avg_pool"))
    with pytest.raises(UnsupportedModelError, match=r"LlavaOnevision.*single patches.*avg_pool and trim_llm"):
        RankingSource(adapter_for(model_of("llava_onevision")), make_selector("visionzip"))
    with pytest.raises(UnsupportedModelError, match=r"no CLS token.*attention=received"):
        RankingSource(adapter_for(model_of("llava_onevision")), make_selector("hired"))
    with pytest.raises(UnsupportedModelError, match=r"parts of an input of VideoLlava.* are no tiles"):
        make_selector("flowcut").tower_grid(adapter_for(model_of("video_llava")))
    with pytest.raises(DopError, match=r"`0 < layer < 1` as the layer's depth.*layer=1.0"):
        make_selector("cls_attention", {"layer": 1.0}).needs()  # would be equal to the second layer, 1


def test_a_layer_is_named_by_number_or_depth():
    for layer in (0, -1, 12, 0.25, 1e-5):
        assert field_and_layer(at_layer("cls_attention", layer)) == ("cls_attention", layer)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_keys_of_a_tower_with_rotary_positions(family):
    """As the tower's own attention rotates them, mean over heads and over the patches of a token."""
    model, inputs = model_of(family), prompts(family, (0, 2))
    adapter, seen, shown = adapter_for(model), {}, {}
    module = adapter.received_attention_module()

    def own(attention, args, kwargs):
        rows = args[0] if args else kwargs["hidden_states"]
        query, key, _ = attention.qkv(rows).reshape(len(rows), 3, attention.num_heads, -1).unbind(1)
        seen["keys"] = apply_rotary_pos_emb_vision(query, key, *kwargs["position_embeddings"])[1].mean(dim=1)

    hook = module.register_forward_pre_hook(own, with_kwargs=True)
    handle = adapter.capture("keys", partial(shown.__setitem__, "keys"))
    try:
        with torch.no_grad():
            model(**inputs)
            expected = seen["keys"].unflatten(0, (-1, 4)).mean(dim=1)
    finally:
        hook.remove()
        handle.remove()
    if family == "qwen2_5_vl":  # the tower orders cells by windows
        distance = (shown["keys"][:, None] - expected[None]).abs().amax(dim=-1)
        assert float(distance.min(dim=1).values.max()) < 1e-5
        assert sorted(distance.argmin(dim=1).tolist()) == list(range(len(expected)))
    else:
        torch.testing.assert_close(shown["keys"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_tokens_know_their_tile(family):
    """A token of tile t is one of the patches that the tower computes for tile t alone; newlines belong to none."""
    model, inputs = model_of(family), prompts(family, (1,))
    adapter, shown = adapter_for(model), {}
    handle = adapter.capture("features", lambda values: shown.update(features=values))
    alone = adapter.tower_view.module
    try:
        with torch.no_grad():
            model(**inputs)
            ((tiles, (grid,)),) = adapter.token_tiles([len(shown["features"])])
            pixels = inputs["pixel_values"].flatten(0, 1)
            layer = adapter.tower_view.feature_layer + 1
            states = alone(pixels, output_hidden_states=True).hidden_states[layer][:, adapter.tower_view.num_extra :]
    finally:
        handle.remove()
    assert grid[0] * grid[1] + 1 == len(states) > 2
    assert set(tiles.tolist()) == set(range(-1, len(states)))
    for tile in range(len(states)):
        its = shown["features"][tiles == tile]
        distance = torch.cdist(its, states.flatten(0, 1))
        assert (distance.argmin(dim=1) // states.shape[1] == tile).all()
        assert float(distance.min(dim=1).values.max()) < 1e-4
    embeds = int(adapter.visual_token_mask(inputs["input_ids"]).sum())
    newlines = (tiles < 0).nonzero()[:, 0].tolist()
    assert len(tiles) == embeds
    assert newlines[-1] == embeds - 1, "the last row ends with one"


@pytest.mark.parametrize(
    "name",
    [
        "visionzip",
        "prumerge_plus",
        "vispruner",
        "vscan",
        "prunesid",
        "hiprune",
        "hired",
        "scope",
        "cdpruner_llm",
        "flowcut",
    ],
)
def test_every_tile_keeps_its_share_and_newlines_go_first(name):
    model, inputs = model_of("llava_next"), prompts("llava_next", (1,))
    adapter, seen = adapter_for(model), {}
    visual = adapter.visual_token_mask(ids := inputs["input_ids"])
    count = int(visual.sum())
    source = RankingSource(adapter, make_selector(name), num_kept=count // 3)
    hook = adapter.text_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(embeds=kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**inputs)
            (sample,) = source.sample_inputs([count], Tokens(seen["embeds"], ids, visual))
            selection = source.selector.select(sample, count // 3)
    finally:
        hook.remove()
        source.close()
    tiles = sample.tiles.numpy()
    kept = selection.order[: count // 3]
    assert sorted(selection.order) == list(range(count))
    assert (tiles[kept] >= 0).all()
    assert sample.tower_sizes is None or bool((sample.tower_sizes[kept] > 0).all()), "what the tower left out"
    if name != "hired":
        sizes = np.bincount(tiles[tiles >= 0])
        fair = len(kept) * sizes / sizes.sum()
        limit = 2 if SELECTORS[name].nested else 1  # taking turns
        assert np.abs(np.bincount(tiles[kept], minlength=len(sizes)) - fair).max() < limit
    assert (tiles[selection.slots] >= 0).all()
