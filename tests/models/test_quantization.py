"""A decoder with weights in fewer bits is profiled, searched and pruned like any other, where its package runs."""

from __future__ import annotations

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from dop_search import pruned
from dop_search.divergence import DivergenceEngine, make_teacher
from dop_search.divergence.footprint import Footprint
from dop_search.divergence.memory import weight_bytes
from dop_search.divergence.profiling import profile
from dop_search.models.loading import load
from dop_search.models.prompts import model_inputs
from dop_search.models.quantization import kept_modules, packed_bytes, stored
from dop_search.search import CurveGrid
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.testing.naive import naive_divergence
from dop_search.utils.errors import DopError

PACKAGES = {"bnb4": "bitsandbytes", "bnb8": "bitsandbytes", "int8": "torchao"}


@pytest.fixture(scope="module", params=PACKAGES)
def quantised(request):
    package = PACKAGES[request.param]
    pytest.importorskip(package, reason=f"optional: pip install {package} to test {request.param}")
    return request.param, load("pocket", dtype="float32", quantization=request.param)


def test_only_the_decoder_is_packed(quantised, pocket):
    name, loaded = quantised
    linears = [module for module in pocket.adapter.layers.modules() if isinstance(module, torch.nn.Linear)]
    saved = sum(linear.weight.nbytes - packed_bytes(linear, name, 4) for linear in linears)
    assert weight_bytes(loaded.model) == pytest.approx(weight_bytes(pocket.model) - saved, rel=0.02)
    for part in ("vision_tower", "multi_modal_projector"):
        ours, plain = (getattr(model.model.model, part).state_dict() for model in (loaded, pocket))
        assert all(torch.equal(ours[key], plain[key]) for key in plain)
    assert torch.equal(loaded.model.lm_head.weight, pocket.model.lm_head.weight)
    assert Footprint.of(loaded.adapter).unpacked > 0 == Footprint.of(pocket.adapter).unpacked


def test_answers_stay_close_and_numbers_equal_plain_forwards(quantised, pocket, few_samples):
    """The engine on packed weights against whole forwards of the pruned model, images and all."""
    name, loaded = quantised
    teacher = make_teacher(loaded, few_samples, make_selector("cls_attention"), max_new_tokens=4)
    plain = make_teacher(pocket, few_samples, make_selector("cls_attention"), max_new_tokens=4)
    same = [a.answer_ids == b.answer_ids for a, b in zip(teacher.samples, plain.samples, strict=True)]
    assert sum(same) >= len(same) - 2, "weights in fewer bits say nearly the same"
    strategies = [Strategy.depthwise(12, 6, 8, 5), Strategy.depthwise(12, 9, 9, 3, num_visual_tokens=60)]
    scores = DivergenceEngine(loaded.adapter, teacher).evaluate(strategies)
    naive = np.stack([naive_divergence(loaded, few_samples.samples, teacher, strategy) for strategy in strategies])
    # int8 matrix products of LLM.int8 round the activations of a call by its largest: other batches, other roundings
    tolerance = {"rtol": 0.3, "atol": 0.02} if name == "bnb8" else {"rtol": 2e-3, "atol": 2e-5}
    np.testing.assert_allclose(scores, naive, **tolerance)


def test_profile_search_and_generation(quantised, few_samples):
    _, loaded = quantised
    found = profile(loaded, few_samples, space="dop", grid=CurveGrid.of(3, 3), max_new_tokens=4)
    strategy = found.solve(Budget(flops_ratio=0.4))
    inputs = model_inputs(loaded.processor, few_samples.samples[:2], loaded.adapter.device)
    with pruned(loaded.model, strategy):
        ids = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert ids.shape[1] > inputs["input_ids"].shape[1]


def test_the_fingerprint_covers_packed_weights_and_scales(quantised, pocket):
    name, loaded = quantised
    again = load("pocket", dtype="float32", quantization=name)
    assert again.weights_fingerprint == loaded.weights_fingerprint != pocket.weights_fingerprint
    parts = dict(part for key, value in again.model.named_parameters() for part in stored(key, value))
    scales = [value for key, value in parts.items() if key.rsplit(".", 1)[1] in ("absmax", "SCB", "scale")]
    assert len(scales) >= 12 * 7


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(
        "dop_search.models.quantization.find_spec", lambda name: None if name == "bitsandbytes" else find_spec(name)
    )
    with pytest.raises(DopError, match=r"quantization=bnb4 needs the package bitsandbytes.*pip install bitsandbytes"):
        load("pocket", quantization="bnb4")


def test_an_unknown_name_is_refused():
    with pytest.raises(DopError, match=r"`quantization` must be one of bnb4, bnb8, int8, but got 'int3'"):
        load("pocket", quantization="int3")


def test_all_but_the_decoder_is_kept(pocket):
    assert set(kept_modules(pocket.model.config)) == {"model.vision_tower", "model.multi_modal_projector", "lm_head"}
