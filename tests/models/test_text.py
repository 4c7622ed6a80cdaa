"""Decoders that read text alone: which tokens are their context, how prompts are made, what is refused."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from support.tiny_inputs import tiny_sample
from support.tiny_models import tiny_model

import dop_search as dop
from dop_search.data.samples import Sample, with_context
from dop_search.evaluation.timing.layer_times import image_order, synthetic_prompt
from dop_search.models import adapter_for
from dop_search.models.families import TEXT_MODELS
from dop_search.models.prompts import model_inputs
from dop_search.models.text import MARKERS_KEY, context_mask
from dop_search.models.text_processor import TextProcessor
from dop_search.pruning.asking import attention_from_text
from dop_search.strategy.operations import TokenCounts
from dop_search.testing.inputs import collate
from dop_search.testing.reference import _between, masked_forward, text_positions, visual_positions
from dop_search.testing.strategies import corner_strategy, random_rankings
from dop_search.testing.tokenizer import tiny_tokenizer
from dop_search.utils.errors import DataError, DopError, UnsupportedModelError

TEMPLATE = "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}\n{% endfor %}[assistant]\n"
PASSAGE = with_context("one two, three", "What?")


def processor():
    tokenizer = tiny_tokenizer("<image>")
    tokenizer.chat_template = TEMPLATE
    return TextProcessor(tokenizer)


def sample(question=PASSAGE, image=None, **fields):
    return Sample("a", image, question, (), "any", **fields)


@pytest.mark.parametrize("markers", [([1], [2]), ([1], [2, 1]), ([1, 2], [0, 2]), ([1, 0], [2, 0])])
def test_a_context_is_what_stands_between_its_markers(markers):
    """Every sequence of three ids up to length 7, against a reading token by token."""
    for length in range(1, 8):
        rows = list(itertools.product((0, 1, 2), repeat=length))
        found = context_mask(torch.tensor(rows), *markers)
        assert found.tolist() == [_between(list(row), *markers) for row in rows]


@pytest.mark.parametrize("model_type", TEXT_MODELS)
def test_pruned_contexts_equal_the_masked_reference(model_type):
    model = tiny_model(model_type)
    inputs = collate([tiny_sample(model, 3, 4, num_images=2), tiny_sample(model, 0, 2, seed=1, image_shape=1)])
    counts = visual_positions(model, inputs["input_ids"]).sum(dim=1).tolist()
    assert counts == [28, 16]
    text, rankings = text_positions(model, inputs), random_rankings(counts, 0)
    for corner in ("layer_sets", "half_of_the_tokens", "half_depth"):
        strategy = corner_strategy(corner, 4)
        expected = masked_forward(model, inputs, strategy, rankings)[text]
        with torch.no_grad(), dop.pruned(model, strategy, rankings=rankings):
            logits = model(**inputs).logits[text]
        assert (logits - expected).abs().max() <= 2e-5 * expected.abs().max()


def test_received_attention_is_that_of_the_models_first_layer():
    """As transformers' eager attention says, with padding and without; the text after the context asks."""
    model = tiny_model("llama", attn_implementation="eager")
    samples = [tiny_sample(model, 3, 4), tiny_sample(model, 2, 6, seed=1, image_shape=2)]
    batch, adapter = collate(samples), adapter_for(model)
    embeds, visual = model.model.embed_tokens(batch["input_ids"]), adapter.visual_token_mask(batch["input_ids"])
    for row, one in enumerate(samples):
        with torch.no_grad():
            weights = model(**one, output_attentions=True).attentions[0][0].mean(dim=0)
        places = visual_positions(model, one["input_ids"])[0].nonzero()[:, 0]
        expected = weights[int(places[-1]) + 1 :, places].mean(dim=0)
        found = attention_from_text(adapter, embeds[row], visual[row], batch["attention_mask"][row].bool())
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("selector", ["random", "uniform_grid", "received_attention", "divprune", "cdpruner_llm"])
def test_selectors_of_text_keep_a_batch_and_its_samples_alike(selector):
    model = tiny_model("llama")
    samples = [tiny_sample(model, 3, 4), tiny_sample(model, 2, 6, seed=1, image_shape=2)]
    strategy = dop.Strategy.depthwise(4, 3, 3, 2, num_visual_tokens=5, selector=selector)
    with torch.no_grad(), dop.pruned(model, strategy):
        together = model(**collate(samples)).logits[:, -1]
        alone = torch.cat([model(**one).logits[:, -1] for one in samples])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "selector", ["cls_attention", "visionzip", "avg_pool", "tome", "vispruner", "trim_llm", "scope"]
)
def test_selectors_of_images_are_refused_by_name(selector):
    strategy = dop.Strategy.full(4, num_visual_tokens=5, selector=selector)
    with pytest.raises(UnsupportedModelError, match=rf"'{selector}' works on images.*received_attention, divprune"):
        dop.prune_(tiny_model("llama"), strategy)


def test_a_model_that_does_not_know_its_markers_is_refused():
    model = tiny_model("llama")
    delattr(model.config, MARKERS_KEY)
    with pytest.raises(UnsupportedModelError, match=r"load it by dop.load"):
        dop.prune_(model, dop.Strategy.full(4, num_visual_tokens=5, selector="random"))


def test_a_folder_is_loaded_searched_and_pruned(tmp_path):
    """From files to a strategy; the same passage in a batch, in the profile and in ``generate()``."""
    model, made = tiny_model("qwen3"), processor()
    delattr(model.config, MARKERS_KEY)
    model.generation_config.suppress_tokens = None
    model.save_pretrained(tmp_path)
    made.tokenizer.save_pretrained(tmp_path)
    loaded = dop.load(str(tmp_path))
    data = dop.validation_set("passages", num_samples=3, seed=0)
    short = [sample(with_context(s.question[10:70].strip("\n<>/"), "What?")) for s in data.samples]
    own = dop.data.samples.ValidationSet(
        "own", "search", 0, tuple(Sample(str(i), None, s.question, (), "") for i, s in enumerate(short))
    )
    profile = dop.profile(loaded, own, selector="received_attention", max_new_tokens=3)
    strategy = profile.solve(budget=dop.Budget(flops_ratio=0.8))
    assert profile.store.evaluate([strategy]).min() >= 0.0
    inputs = model_inputs(loaded.processor, own.samples, torch.device("cpu"))
    with dop.pruned(loaded.model, strategy):
        assert loaded.model.generate(**inputs, max_new_tokens=2).shape[1] == inputs["input_ids"].shape[1] + 2


def test_a_prompt_marks_its_context_and_nothing_else():
    made = processor()
    inputs = model_inputs(made, [sample(), sample(with_context("x", "Why not?"))], torch.device("cpu"))
    mask = context_mask(inputs["input_ids"], *made.markers)
    inside = [made.tokenizer.decode(row[its]) for row, its in zip(inputs["input_ids"], mask, strict=True)]
    assert inside == ["\none two, three\n", "\nx\n"]
    assert made.tokenizer.decode(inputs["input_ids"][0][inputs["attention_mask"][0].bool()]) == (
        f"[user]{PASSAGE}\n[assistant]"
    )


def test_samples_and_models_that_do_not_go_together_are_refused(tmp_path):
    picture = dop.validation_set("pocket", num_samples=1).samples[0]
    with pytest.raises(DataError, match=r"reads text alone.*data=passages"):
        model_inputs(processor(), [picture], torch.device("cpu"))
    with pytest.raises(DataError, match=r"reads images, but the sample 'a' has none; use data=pocket"):
        model_inputs(dop.load("pocket").processor, [sample()], torch.device("cpu"))
    for question in ("What?", "<context>a", "a</context>", "<context>a<context>b</context>"):
        with pytest.raises(DataError, match="begins and ends once"):
            sample(question)


def test_layer_times_are_measured_on_contexts_of_the_counts_asked_for():
    """What latency budgets are solved with."""
    model = tiny_model("llama")
    inputs = synthetic_prompt(model, TokenCounts(9, 11))
    counts = TokenCounts.of_prompt(visual_positions(model, inputs["input_ids"])[0].numpy())
    assert (counts.text, counts.visual) == (9, 11)
    assert image_order(inputs, model).tolist() == list(range(11))


def test_a_file_of_passages_is_cut_by_passage(tmp_path):
    rows = [{"context": f"Passage {n // 2}.", "question": f"Question {n}?"} for n in range(12)]
    path = tmp_path / "my.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows))
    sets = [dop.validation_set("jsonl", 4, 0, split, path=path) for split in ("search", "heldout", "test")]
    seen = [{its.content for its in data} for data in sets]
    assert [len(contents) for contents in seen] == [2, 2, 2]
    assert not seen[0] & seen[1]
    assert sets[0].samples[0].question.startswith("<context>\nPassage ")
    path.write_text('{"context": "a </context> b", "question": "What?"}')
    with pytest.raises(DataError, match=r"line 1.*begins and ends once"):
        dop.validation_set("jsonl", 1, path=path)


def test_splits_of_passages_share_none():
    sets = {
        split: dop.validation_set("passages", 60, seed, split)
        for split in ("search", "heldout", "test")
        for seed in (0,)
    }
    seen = {split: {its.content for its in data} for split, data in sets.items()}
    assert all(len(contents) == 60 for contents in seen.values())
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other
    later = dop.validation_set("passages", 60, 7, "heldout")
    assert not {its.content for its in later} & seen["search"], "whatever the seed"
    again = dop.validation_set("passages", 20, 0, "search")
    assert again.samples == sets["search"].samples[:20]
    with pytest.raises(DopError, match=r"no families \['chart'\]"):
        dop.validation_set("passages", 3, families=["chart"])
