"""Every family with its real processor: prompts with several images, sizes and videos, from loading to generating."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings

import dop_search as dop
from dop_search.data.samples import Sample, ValidationSet
from dop_search.models import FAMILIES, adapter_for
from dop_search.models.prompts import chat_prompt, model_inputs
from dop_search.pruning.ranking import RankingSource, visual_counts
from dop_search.search import CurveGrid
from dop_search.selectors import make_selector
from dop_search.testing.measure import model_state, state_difference
from dop_search.testing.models import tiny_model
from dop_search.testing.naive import naive_divergence
from dop_search.testing.processors import VIDEO_FAMILIES, drawn_image, drawn_video, tiny_processor
from dop_search.testing.reference import masked_forward, text_positions, visual_positions
from dop_search.testing.strategies import corner_strategy, dop_strategies, random_rankings
from dop_search.utils.errors import DataError, DopError, UnsupportedModelError

SIZES = ((56, 40), (30, 70), (50, 50), (29, 28))
QUESTIONS = ("What is this?", "How many?", "Is there a red shape, or not?")
PROMPTS = [(family, media) for family in FAMILIES for media in ("sizes", "several", "video", "mixed")]
PROMPTS = [(family, media) for family, media in PROMPTS if family in VIDEO_FAMILIES or media in ("sizes", "several")]

model_of = cache(tiny_model)
processor_of = cache(tiny_processor)
prompts = pytest.mark.parametrize(("family", "media"), PROMPTS)
families = pytest.mark.parametrize("family", FAMILIES)


def process(family, images_per_prompt=(), videos=0, video_first=False):
    """A left-padded batch from rendered images and videos; a prompt has images, and then maybe a video of its own."""
    processor, number = processor_of(family), iter(range(99))
    images = [[drawn_image(*SIZES[n % 4], n) for n in (next(number) for _ in range(k))] for k in images_per_prompt]
    count = max(len(images), videos)
    texts = [
        chat_prompt(processor, QUESTIONS[row], len(images[row]) if images else 0, int(row < videos))
        for row in range(count)
    ]
    kwargs = {"images": images} if images else {}
    if videos:
        kwargs["videos"] = [drawn_video(4, 30, 40, seed) for seed in range(videos)]
    batch = processor(text=texts, padding=True, return_tensors="pt", **kwargs)
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def batch_of(family, media):
    return {
        "sizes": lambda: process(family, (1, 1, 1)),
        "several": lambda: process(family, (2, 1)),
        "video": lambda: process(family, videos=1),
        "mixed": lambda: process(family, (1,), videos=1),
    }[media]()


@prompts
def test_real_inputs_equal_the_masked_reference(family, media):
    model, inputs = model_of(family), batch_of(family, media)
    counts = visual_positions(model, inputs["input_ids"]).sum(dim=1).tolist()
    assert min(counts) > 0
    text = text_positions(model, inputs)
    for seed, corner in enumerate(("layer_sets", "half_of_the_tokens", "half_depth")):
        strategy, rankings = corner_strategy(corner, 4), random_rankings(counts, seed)
        expected = masked_forward(model, inputs, strategy, rankings)[text]
        with torch.no_grad(), dop.pruned(model, strategy, rankings=rankings):
            logits = model(**inputs).logits[text]
        assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


def rankings_of(family, inputs, selector, run):
    model = model_of(family)
    adapter = adapter_for(model)
    source = RankingSource(adapter, make_selector(selector))
    try:
        with torch.no_grad():
            run(model, inputs)
    finally:
        source.close()
    return source.rank(visual_counts(adapter.visual_token_mask(inputs["input_ids"])))


def forward(model, inputs):
    model(**inputs)


def generate(model, inputs):
    model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)


@prompts
@pytest.mark.parametrize("selector", ["uniform_grid", "received_attention"])
def test_rankings_are_permutations_and_the_same_in_generate(family, media, selector):
    """``generate()`` encodes the images before the model's forward, and once for all beams."""
    inputs = batch_of(family, media)
    rankings = rankings_of(family, inputs, selector, forward)
    for ranking, row in zip(rankings, inputs["input_ids"], strict=True):
        assert sorted(ranking) == list(range(int(adapter_for(model_of(family)).visual_token_mask(row).sum())))
    for ranking, again in zip(rankings, rankings_of(family, inputs, selector, generate), strict=True):
        np.testing.assert_array_equal(ranking, again)


@families
def test_a_ranking_does_not_depend_on_the_batch(family):
    together = rankings_of(family, process(family, (2, 1)), "received_attention", forward)
    alone = rankings_of(family, process(family, (2,)), "received_attention", forward)
    np.testing.assert_array_equal(together[0], alone[0])


@families
def test_pruned_generation_with_a_selector_of_its_own(family):
    """The whole way: tower, ranking, packed prefill, cached decoding, beams; the same twice, and not the full model."""
    model, inputs = model_of(family), batch_of(family, "several")
    strategy = dop.Strategy.depthwise(4, 3, 3, 2, num_visual_tokens=5, selector="received_attention")
    arguments = {"max_new_tokens": 3, "do_sample": False, "num_beams": 2, "output_scores": True}
    before = model_state(model)
    with torch.no_grad():
        full = model.generate(**inputs, **arguments, return_dict_in_generate=True).scores[0]
        with dop.pruned(model, strategy):
            first = model.generate(**inputs, **arguments, return_dict_in_generate=True).scores[0]
            second = model.generate(**inputs, **arguments, return_dict_in_generate=True).scores[0]
    assert torch.equal(first, second)
    assert state_difference(before, model_state(model)) == []
    assert not torch.allclose(first, full)
    rankings = rankings_of(family, inputs, "received_attention", forward)
    expected = masked_forward(model, inputs, strategy, rankings)[:, -1].log_softmax(-1)
    finite = torch.isfinite(first[::2])
    torch.testing.assert_close(first[::2][finite], expected[finite], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_selectors_that_need_a_cls_token_are_refused(family):
    before = model_state(model_of(family))
    strategy = dop.Strategy.depthwise(4, 2, 2, 2, num_visual_tokens=3, selector="cls_attention")
    with pytest.raises(UnsupportedModelError, match=r"no CLS token.*selector=received_attention"):
        dop.prune_(model_of(family), strategy)
    assert state_difference(before, model_state(model_of(family))) == []


def test_other_models_are_refused_with_a_guide():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=8, n_embd=8, n_layer=1, n_head=1)
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*internvl, llava, .*qwen3_vl.*README\.md"):
        adapter_for(GPT2LMHeadModel(config))


def test_an_offloaded_decoder_is_refused():
    model = tiny_model("llava")
    model.model.language_model.layers[2].to("meta")
    with pytest.raises(UnsupportedModelError, match=r"1 of 5 parts .* are offloaded .*device_map=auto"):
        dop.prune_(model, dop.Strategy.depthwise(4, 2, 2, 2, selector="explicit"), rankings=[])


def test_transformers_static_cache_and_assisted_decoding_are_refused():
    model, inputs = model_of("llava"), process("llava", (1,))
    strategy = dop.Strategy.depthwise(4, 2, 2, 2, selector="uniform_grid")
    with dop.pruned(model, strategy):
        with pytest.raises(DopError, match=r"DynamicCache.*StaticCache"):
            model.generate(**inputs, max_new_tokens=2, cache_implementation="static")
        with pytest.raises(DopError, match="assisted decoding and prompt lookup are not available"):
            model.generate(**inputs, max_new_tokens=8, do_sample=False, prompt_lookup_num_tokens=2)


# -- a folder on disk, and the whole search ------------------------------------------------------------


def validation_set():
    samples = tuple(
        Sample(f"drawn/{n}", drawn_image(*SIZES[n], n), QUESTIONS[n % 3], ("yes",), "drawn") for n in range(4)
    )
    return ValidationSet("drawn", "search", 0, samples)


@pytest.fixture(scope="module")
def loaded_of(tmp_path_factory):
    @cache
    def load(family):
        folder = tmp_path_factory.mktemp(family)
        model_of(family).save_pretrained(folder)
        tiny_processor(family).save_pretrained(folder)
        return dop.load(str(folder), device="cpu", dtype="float32")

    return load


@families
def test_from_a_folder_to_pruned_generation(family, loaded_of):
    loaded = loaded_of(family)
    assert loaded.model.config.model_type == family
    data = validation_set()
    profile = dop.profile(
        loaded,
        data,
        "received_attention",
        space="dop",
        grid=CurveGrid(max_all_depths=0, num_depths=3, num_token_levels=3),
        max_new_tokens=4,
    )
    strategy = profile.solve(budget=dop.Budget(flops_ratio=0.7))
    assert 0.0 < strategy.provenance["cost_ratio"] <= 0.7
    sample = data.samples[0]
    inputs = loaded.processor(
        images=[sample.image], text=[chat_prompt(loaded.processor, sample.question)], return_tensors="pt"
    )
    with dop.pruned(loaded.model, strategy):
        tokens = loaded.model.generate(**inputs, max_new_tokens=3)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 3


def test_placement_by_accelerate_on_one_device(loaded_of):
    pytest.importorskip("accelerate")
    plain = loaded_of("qwen2_vl")
    loaded = dop.load(plain.name, dtype="float32", device_map="cpu", attn_implementation="eager")
    assert loaded.weights_fingerprint == plain.weights_fingerprint
    assert loaded.adapter.text_config._attn_implementation == "eager"
    inputs = process("qwen2_vl", (1,))
    strategy = dop.Strategy.depthwise(4, 2, 3, 1, selector="uniform_grid")
    logits = []
    for model in (plain.model, loaded.model):
        with torch.no_grad(), dop.pruned(model, strategy):
            logits.append(model(**inputs).logits[:, -1])
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


@families
def test_engine_equals_plain_pruned_forwards(family, loaded_of):
    """Multimodal positions and deepstack included; with early start, shared prefixes, and from the cache on disk."""
    from dop_search.divergence import DivergenceEngine, make_teacher

    loaded, data = loaded_of(family), validation_set()
    teacher = make_teacher(loaded, data, make_selector("uniform_grid"), max_new_tokens=4)
    strategies = [
        dop.Strategy.depthwise(4, 2, 3, 1, selector="uniform_grid"),
        dop.Strategy.depthwise(4, 3, 4, 2, num_visual_tokens=6, selector="uniform_grid"),
        dop.Strategy.from_array(
            np.random.default_rng(0).random((2, 4, 3)) < 0.6, shares=(0.25, 0.75), selector="uniform_grid"
        ),
    ]
    naive = np.stack([naive_divergence(loaded, data.samples, teacher, strategy) for strategy in strategies])
    assert naive.min() > 1e-3
    for keep_states in (True, False):
        scores = DivergenceEngine(loaded.adapter, teacher, keep_states=keep_states).evaluate(strategies)
        np.testing.assert_allclose(scores, naive, rtol=2e-3, atol=2e-5)


def test_deepstack_survives_the_teachers_cache(loaded_of, tmp_path):
    from dop_search.divergence import make_teacher

    loaded, data = loaded_of("qwen3_vl"), validation_set()
    first, second = (
        make_teacher(loaded, data, make_selector("random"), max_new_tokens=3, cache_dir=tmp_path) for _ in range(2)
    )
    for a, b in zip(first.samples, second.samples, strict=True):
        assert len(a.encoded.deepstack) == 2
        for x, y in zip(a.encoded.deepstack, b.encoded.deepstack, strict=True):
            assert torch.equal(x, y)
            assert len(x) == a.encoded.num_visual


@settings(max_examples=10, derandomize=True, database=None, deadline=None)
@given(strategy=dop_strategies(4, selector="random"))
def test_the_engine_injects_deepstack_under_any_strategy(strategy, loaded_of):
    from dop_search.divergence import DivergenceEngine

    loaded = loaded_of("qwen3_vl")
    teacher, samples = _teacher(loaded)
    scores = DivergenceEngine(loaded.adapter, teacher).evaluate([strategy])
    naive = naive_divergence(loaded, samples, teacher, strategy)
    np.testing.assert_allclose(scores[0], naive, rtol=2e-3, atol=2e-5)


@cache
def _teacher(loaded):
    from dop_search.divergence import make_teacher

    data = ValidationSet("drawn", "search", 0, validation_set().samples[:2])
    return make_teacher(loaded, data, make_selector("random"), max_new_tokens=3), data.samples


# -- images of extreme shapes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(300, 1), (4, 300)])
@pytest.mark.parametrize("family", ["llava_next", "llava_onevision"])
def test_unpadding_that_leaves_no_row_or_no_column(family, size):
    """The plain model runs on them: of the tiles nothing is left, or newlines alone."""
    model, processor = model_of(family), processor_of(family)
    inputs = model_inputs(processor, [Sample("a", drawn_image(*size), "What?", (), "all")], torch.device("cpu"))
    for selector in ("received_attention", "uniform_grid", *(("hired", "scope") if family == "llava_next" else ())):
        strategy = dop.Strategy.depthwise(4, 2, 3, 1, 3, selector=selector)
        with torch.no_grad(), dop.pruned(model, strategy):
            assert bool(model(**inputs).logits.isfinite().all())


def test_an_image_that_the_processor_refuses_is_named():
    samples = [Sample(n, drawn_image(*size), "What?", (), "all") for n, size in (("a", (40, 40)), ("b/7", (900, 4)))]
    with pytest.raises(DataError, match=r"the sample 'b/7': .*aspect ratio.*its images are 900x4 pixels: leave it out"):
        model_inputs(processor_of("qwen2_vl"), samples, torch.device("cpu"))
