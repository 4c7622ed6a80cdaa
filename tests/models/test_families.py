"""What families refuse, and what is special about some of them on a folder that was saved."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from support.tiny_families import tiny_processor
from support.tiny_models import tiny_model

import dop_search as dop
from dop_search.data.samples import Sample
from dop_search.models import adapter_for
from dop_search.models.prompts import chat_prompt, model_inputs
from dop_search.selectors import make_selector
from dop_search.testing.conformance.processing import QUESTIONS, SIZES, drawn_samples
from dop_search.testing.measure import model_state, state_difference
from dop_search.testing.naive import naive_divergence
from dop_search.testing.processors import drawn_image
from dop_search.testing.strategies import dop_strategies
from dop_search.utils.errors import DataError, DopError, UnsupportedModelError

model_of = cache(tiny_model)
processor_of = cache(tiny_processor)


def process(family, images_per_prompt=()):
    """A left-padded batch from rendered images."""
    processor = processor_of(family)
    images = [[drawn_image(*SIZES[n], n) for n in range(count)] for count in images_per_prompt]
    texts = [chat_prompt(processor, QUESTIONS[row], len(images[row])) for row in range(len(images))]
    return dict(processor(text=texts, padding=True, return_tensors="pt", images=images))


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
    with pytest.raises(UnsupportedModelError, match=r"GPT2LMHeadModel.*internvl, .*llava, .*qwen3_vl.*README\.md"):
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


# -- a folder on disk ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def loaded_of(tmp_path_factory):
    @cache
    def load(family):
        folder = tmp_path_factory.mktemp(family)
        model_of(family).save_pretrained(folder)
        tiny_processor(family).save_pretrained(folder)
        return dop.load(str(folder), device="cpu", dtype="float32")

    return load


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


def test_deepstack_survives_the_teachers_cache(loaded_of, tmp_path):
    from dop_search.divergence import make_teacher

    loaded, data = loaded_of("qwen3_vl"), drawn_samples(4)
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

    data = drawn_samples(2)
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
