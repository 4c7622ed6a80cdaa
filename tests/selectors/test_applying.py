"""Selectors at work: under ``pruned``, in generation, in batches and beams, and in the divergence engine."""

import numpy as np
import pytest
import torch
from support.answers import answer_questions
from support.tiny_inputs import tiny_inputs
from support.tiny_models import tiny_model
from torch.utils.flop_counter import FlopCounterMode

import dop_search as dop
from dop_search.data.validation import validation_set
from dop_search.divergence import DivergenceEngine, make_teacher
from dop_search.divergence import teacher as teacher_module
from dop_search.evaluation.accuracy import correct_answers
from dop_search.models.prompts import model_inputs
from dop_search.pruning.packed import Tokens
from dop_search.pruning.ranking import RankingSource, text_read_with_image
from dop_search.selectors import SELECTORS, Selection, SelectionSizes, Selector, make_selector
from dop_search.utils.errors import DopError, UnsupportedModelError

LAYERS = 12
NEEDS_CLIP = ("cdpruner", "trim")
WORKING = sorted(set(SELECTORS) - set(NEEDS_CLIP))
CHOOSING_AGAIN = sorted(name for name in WORKING if SELECTORS[name]().chooses_per_count)


def strategy(name, num_kept, **options):
    return dop.Strategy.depthwise(LAYERS, 9, 10, 8, num_kept, selector=name, selector_options=options)


def logits_of(pocket, inputs, *arguments, **options):
    with torch.inference_mode(), dop.pruned(pocket.model, strategy(*arguments, **options)):
        return pocket.model(**inputs).logits


@pytest.fixture(scope="module")
def batch_of_two(pocket, few_samples):
    """Samples, inputs, and the full model's logits; see below for why not sample 0."""
    samples = few_samples.samples[1:3]
    together = model_inputs(pocket.processor, samples, torch.device("cpu"))
    with torch.inference_mode():
        return samples, together, pocket.model(**together).logits


@pytest.mark.parametrize("name", WORKING)
@pytest.mark.fast_cases(4)
def test_batch_equals_singles_and_nothing_is_left_behind(name, pocket, batch_of_two):
    """Not with sample 0: two of its patches have the same attention up to 1e-10, which VisPruner's rounds amplify."""
    samples, together, before = batch_of_two
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pocket.model.modules())
    logits = logits_of(pocket, together, name, 40)
    for row, sample in enumerate(samples):
        alone = model_inputs(pocket.processor, [sample], torch.device("cpu"))
        expected = logits_of(pocket, alone, name, 40)[0, -5:]
        torch.testing.assert_close(logits[row, -5:], expected, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(logits[:, -1], before[:, -1], atol=1e-2), "the strategy does something"
    with torch.inference_mode():
        assert torch.equal(pocket.model(**together).logits, before), "bit-identical after the context"
    assert hooks == sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in pocket.model.modules())


@pytest.mark.parametrize("name", ["visionzip", "trim_llm", "resize", "tome"])
def test_beams_of_a_batch_equal_beams_of_singles(name, pocket, few_samples):
    """``generate`` encodes an image once for all beams; merged features must reach every one of them."""
    samples = few_samples.samples[:2]
    options = {"max_new_tokens": 4, "num_beams": 3, "do_sample": False, "pad_token_id": 0}

    def generated(batch):
        inputs = model_inputs(pocket.processor, batch, torch.device("cpu"))
        with torch.inference_mode(), dop.pruned(pocket.model, strategy(name, 30)):
            return pocket.model.generate(**inputs, **options)[:, inputs["input_ids"].shape[1] :]

    together = generated(samples)
    for row, sample in enumerate(samples):
        alone = generated([sample])[0].tolist()
        assert together[row].tolist()[: len(alone)] == alone


@pytest.mark.parametrize("name", ["visionzip", "prumerge_plus", "avg_pool", "trim_llm"])
def test_merged_features_reach_the_decoder_at_their_slots(name, pocket, few_samples):
    """The decoder's input differs from the full model's at the slots alone, by what the selector says."""
    inputs = model_inputs(pocket.processor, few_samples.samples[:1], torch.device("cpu"))
    adapter, selector, seen = pocket.adapter, make_selector(name), {}

    def see(module, args, kwargs):
        seen["embeds"] = kwargs["inputs_embeds"]

    source = RankingSource(adapter, selector)
    hook = adapter.text_model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        with torch.inference_mode():
            pocket.model(**inputs)
            visual = adapter.visual_token_mask(inputs["input_ids"])
            tokens = Tokens(seen["embeds"], inputs["input_ids"], visual)
            merged = source.prepare(tokens, lambda count: 30)
            (sample,) = source.sample_inputs([256], tokens)
            selection = selector.select(sample, 30)
            expected = selection.features
            if selection.space == "features":
                expected = pocket.model.model.multi_modal_projector(expected)
    finally:
        hook.remove()
        source.close()
    changed = (merged != seen["embeds"]).any(dim=-1)[0]
    place = np.flatnonzero(visual[0].numpy())[selection.slots]
    assert set(np.flatnonzero(changed.numpy())) == set(place)
    torch.testing.assert_close(merged[0, place], expected)


@pytest.mark.parametrize("name", WORKING)
def test_half_precision(name):
    """bfloat16 end to end on a tiny model: scores are computed in float32, features return to the model's type."""
    model = tiny_model("llava").to(torch.bfloat16)
    inputs = tiny_inputs(model)
    chosen = dop.Strategy.full(4, num_visual_tokens=5, selector=name)
    with torch.no_grad(), dop.pruned(model, chosen):
        logits = model(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert torch.isfinite(logits).all()


UNSEEN = {
    "avg_pool": lambda n, kept, hidden, width: n * hidden,
    "cdpruner_llm": lambda n, kept, hidden, width: n * kept**2,
    "prumerge_plus": lambda n, kept, hidden, width: 2 * (32 * kept + n) * width,
    "prunesid": lambda n, kept, hidden, width: 18 * n**3,
    "trim_llm": lambda n, kept, hidden, width: n * hidden,
    "visionzip": lambda n, kept, hidden, width: n * width,
    "vscan": lambda n, kept, hidden, width: n * hidden,
}
"""What a counter of matrix products does not see: the Cholesky factor, eigenvectors, and sums over tokens."""
FREE = ("random", "uniform_grid", "resize", "tome", "flowcut")
"""Their cost, if any, is the tower's."""


@pytest.mark.parametrize("name", sorted(set(WORKING) - set(FREE)))
@pytest.mark.fast_cases(4)
def test_a_selector_costs_what_a_counter_counts(name, pocket, few_samples):
    """A forward with it, less one by random choice; the projector of merged features is left out of both."""
    inputs = model_inputs(pocket.processor, few_samples.samples[:1], torch.device("cpu"))
    adapter, kept = pocket.adapter, 40

    def counted(selector):
        with torch.inference_mode(), dop.pruned(pocket.model, strategy(selector, kept)):
            counter = FlopCounterMode(display=False)
            with counter:
                pocket.model(**inputs)
        modules = counter.get_flop_counts().items()
        projector = sum(sum(its.values()) for module, its in modules if module.endswith("multi_modal_projector"))
        return counter.get_total_flops() - projector

    sizes = SelectionSizes(256, kept, adapter.dims, adapter.tower_width, 256)
    unseen = UNSEEN.get(name, lambda *sizes: 0)(256, kept, adapter.dims.hidden_size, adapter.tower_width)
    found = counted(name) - counted("random") + unseen
    assert SELECTORS[name]().selection_flops(sizes) == pytest.approx(found, rel=0.02)


# -- the divergence engine ---------------------------------------------------------------------------


def by_full_forwards(loaded, samples, teacher, chosen):
    """KL per sample from whole forwards of the pruned Hugging Face model, images and all."""
    result = []
    for sample, known in zip(samples, teacher.samples, strict=True):
        inputs = model_inputs(loaded.processor, [sample], torch.device("cpu"))
        answer = torch.tensor([known.answer_ids[:-1]], dtype=torch.long)
        ids = torch.cat([inputs["input_ids"], answer], dim=1)
        forced = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        with torch.inference_mode(), dop.pruned(loaded.model, chosen):
            ours = loaded.model(**forced).logits[0, inputs["input_ids"].shape[1] - 1 :].log_softmax(dim=-1)
        result.append((known.log_probs.exp() * (known.log_probs - ours)).sum(dim=-1).mean().item())
    return np.array(result)


@pytest.fixture(scope="module")
def one_token_answers(few_samples):
    """Answers of one token: what a selector reads of the text is then the same in the engine and in a plain forward."""
    return dop.validation_set("pocket", num_samples=2, seed=7)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHOOSING_AGAIN)
def test_engine_chooses_again_for_every_number_of_tokens(name, pocket, one_token_answers, tmp_path, monkeypatch):
    """Scores equal plain forwards at several counts in one call; a teacher from disk gives the same scores."""
    samples, options = one_token_answers.samples, {"max_new_tokens": 1, "batch_size": 2, "cache_dir": tmp_path}
    teacher = make_teacher(pocket, one_token_answers, make_selector(name), **options)
    strategies = [
        strategy(name, 24),
        strategy(name, 90),
        dop.Strategy.full(LAYERS, num_visual_tokens=24, selector=name),
    ]
    scores = DivergenceEngine(pocket.adapter, teacher).evaluate([*strategies, strategy(name, None)])
    for chosen, row in zip(strategies, scores, strict=False):
        np.testing.assert_allclose(row, by_full_forwards(pocket, samples, teacher, chosen), rtol=5e-3, atol=5e-5)
    monkeypatch.setattr(teacher_module, "encode", None)  # must not be asked again
    again = make_teacher(pocket, one_token_answers, make_selector(name), **options)
    from_disk = DivergenceEngine(pocket.adapter, again).evaluate(strategies[:1])
    np.testing.assert_allclose(from_disk, scores[:1], rtol=1e-5, atol=1e-7)


def test_the_answer_is_not_part_of_the_text_that_selectors_read():
    visual = torch.tensor([0, 0, 1, 1, 0, 0, 0, 0], dtype=torch.bool)
    prompt = torch.tensor([0, 1, 1, 1, 1, 1, 0, 0], dtype=torch.bool)
    assert text_read_with_image(visual, prompt).nonzero()[:, 0].tolist() == [4, 5]
    assert text_read_with_image(visual, None).nonzero()[:, 0].tolist() == [4, 5, 6, 7]
    image_last = torch.tensor([0, 0, 1, 1], dtype=torch.bool)
    assert text_read_with_image(image_last, None).nonzero()[:, 0].tolist() == [0, 1]


@pytest.mark.slow
def test_profile_and_solve_with_a_merging_selector(pocket, few_samples):
    profile = dop.profile(pocket, few_samples, selector="visionzip", space="uniform", max_new_tokens=2)
    found = profile.solve(dop.Budget(flops_ratio=0.4))
    assert (found.selector, found.selector_options["cls_token"]) == ("visionzip", True)
    assert dop.Strategy.from_json(found.to_json()) == found
    text = answer_questions(pocket, few_samples.samples[:1], found, max_new_tokens=2)
    assert isinstance(text[0], str)


# -- models without what a method needs --------------------------------------------------------------


@pytest.mark.parametrize("name", NEEDS_CLIP)
def test_clip_methods_say_at_once_what_is_missing(name, pocket):
    with pytest.raises(UnsupportedModelError, match=rf"no text encoder.*clip=.*selector={name}_llm"):
        dop.prune_(pocket.model, strategy(name, 20))
    assert "forward" not in pocket.adapter.text_model.__dict__


def test_clip_methods_read_the_question_with_the_models_own_tokenizer(pocket, few_samples, monkeypatch):
    """With a text encoder of the right width, the prompt's text reaches it, the same alone and in a padded batch."""
    texts = []

    class Encoder:
        def project_patches(self, states):
            return states.float()

        def pieces(self, text):
            texts.append(text)
            return torch.ones(1, 128)

    monkeypatch.setattr("dop_search.selectors.clip_text.clip_text", lambda *arguments: Encoder())
    samples = few_samples.samples[:3]
    logits_of(pocket, model_inputs(pocket.processor, samples, torch.device("cpu")), "cdpruner", 30, clip="given")
    for text, sample in zip(texts, samples, strict=True):
        words = "".join(sample.question.split()).lower()
        assert words in "".join(text.split()).lower()


def test_a_tower_of_another_kind_is_refused_by_name(pocket, monkeypatch):
    monkeypatch.setattr(pocket.model.config, "vision_feature_layer", [-1, -2])
    with pytest.raises(UnsupportedModelError, match=r"vision_feature_layer=\[-1, -2\].*divprune"):
        dop.prune_(pocket.model, strategy("prumerge_plus", 20))


def test_a_selector_that_forgot_to_ask_is_told(pocket, few_samples):
    class Forgetful(Selector):
        name = "forgetful"

        def rank(self, inputs, num_kept=None):
            return inputs.tensor("keys")

    source = RankingSource(pocket.adapter, Forgetful())
    with pytest.raises(DopError, match="`keys`, which was not captured"):
        source.rank([256])
    source.close()


def test_a_selection_without_merging_has_no_slots():
    selection = Selection(np.arange(3))
    assert len(selection.slots) == 0
    assert selection.features is None


# -- direction -----------------------------------------------------------------------------------------


def accuracy(pocket, selector):
    samples = validation_set("pocket", 32, 3, "test").samples
    chosen = dop.Strategy.full(LAYERS, num_visual_tokens=22, selector=selector)
    return correct_answers(answer_questions(pocket, samples, chosen), samples).mean()


@pytest.fixture(scope="module")
def accuracy_at_random(pocket):
    return accuracy(pocket, "random")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["cls_attention", "divprune", "vispruner", "cdpruner_llm", "holov", "visionzip"])
def test_methods_keep_more_of_the_answer_than_chance(name, pocket, accuracy_at_random):
    """On the bundled model 22 tokens of a method answer more than 22 random ones; an inverted ranking would not."""
    assert accuracy(pocket, name) > accuracy_at_random + 0.1
