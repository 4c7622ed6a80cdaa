"""What the full model said: agrees with plain generation, and comes back from the cache unchanged."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.answers import answer_questions
from transformers import GenerationConfig

from dop_search.divergence import make_teacher
from dop_search.divergence import teacher as teacher_module
from dop_search.models.generation import end_tokens
from dop_search.models.prompts import model_inputs
from dop_search.selectors import make_selector
from dop_search.utils.errors import CacheError, DataError, NumericalError

OPTIONS = {"max_new_tokens": 6, "batch_size": 4}


def test_answers_are_greedy_and_log_probs_are_the_models(pocket, few_samples, teacher):
    for sample, known in zip(few_samples, teacher.samples, strict=True):
        inputs = model_inputs(pocket.processor, [sample], torch.device("cpu"))
        length = inputs["input_ids"].shape[1]
        with torch.inference_mode():
            output = pocket.model.generate(
                **inputs, max_new_tokens=6, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        said = output.sequences[0, length:].tolist()
        assert tuple(said[: len(known.answer_ids)]) == known.answer_ids
        logits = torch.cat(output.logits)[: len(known.answer_ids)].log_softmax(dim=-1)
        torch.testing.assert_close(known.log_probs, logits, rtol=1e-3, atol=1e-3)
        assert known.encoded.prompt_length == length
        assert known.encoded.num_visual == int((inputs["input_ids"] == pocket.model.config.image_token_id).sum())


SHIPPED = {
    "suppress_tokens": [387, 423],
    "begin_suppress_tokens": [387],
    "bad_words_ids": [[387]],
    "sequence_bias": [[[387], -50.0]],
    "min_new_tokens": 3,
    "max_time": 0.0,
    "max_length": 1,
    "return_dict_in_generate": True,
    "num_return_sequences": 2,
    "num_beams": 2,
    "stop_strings": ["x"],
    "prompt_lookup_num_tokens": 2,
    "cache_implementation": "static",
    "repetition_penalty": 5.0,
    "do_sample": True,
}


def test_what_a_checkpoint_ships_for_generation_changes_no_answer(pocket, few_samples, monkeypatch):
    """All at once, of which some change answers and some end in errors; the tokens that end an answer stay."""
    samples = few_samples.samples[:2]
    expected, said = teacher_module.generate_ids(pocket, samples, 4), answer_questions(pocket, samples)
    shipped = GenerationConfig(eos_token_id=2, **SHIPPED)
    monkeypatch.setattr(pocket.model, "generation_config", shipped)
    assert teacher_module.generate_ids(pocket, samples, 4) == expected
    assert answer_questions(pocket, samples) == said
    assert pocket.model.generation_config is shipped
    for end, tokens in ((None, [2]), ([2, 387], [2, 387])):
        shipped.eos_token_id = end
        assert end_tokens(pocket) == tokens


def test_cache_returns_the_same_teacher_without_asking_the_model(pocket, few_samples, teacher, tmp_path, monkeypatch):
    selector = make_selector("cls_attention")
    first = make_teacher(pocket, few_samples, selector, **OPTIONS, cache_dir=tmp_path)

    def forbidden(*args, **kwargs):
        raise AssertionError("the model was asked again")

    monkeypatch.setattr(teacher_module, "generate_ids", forbidden)
    monkeypatch.setattr(teacher_module, "encode", forbidden)
    again = make_teacher(pocket, few_samples, selector, **OPTIONS, cache_dir=tmp_path)
    assert again.fingerprint == first.fingerprint
    for a, b in zip(first.samples, again.samples, strict=True):
        assert (a.id, a.answer_ids, a.encoded.prompt_length) == (b.id, b.answer_ids, b.encoded.prompt_length)
        assert torch.equal(a.log_probs, b.log_probs)
        assert torch.equal(a.encoded.embeds, b.encoded.embeds)
        assert (a.encoded.ranking == b.encoded.ranking).all()


def test_fingerprint_depends_on_selector_answers_and_data(pocket, few_samples):
    from dop_search.data.validation import validation_set

    other = validation_set("pocket", num_samples=6, seed=8)
    cls, grid = make_selector("cls_attention"), make_selector("uniform_grid")
    fingerprints = {
        teacher_module.teacher_fingerprint(pocket, few_samples, cls, 6, "teacher"),
        teacher_module.teacher_fingerprint(pocket, few_samples, grid, 6, "teacher"),
        teacher_module.teacher_fingerprint(pocket, few_samples, cls, 7, "teacher"),
        teacher_module.teacher_fingerprint(pocket, few_samples, cls, 6, "ground_truth"),
        teacher_module.teacher_fingerprint(pocket, other, cls, 6, "teacher"),
    }
    assert len(fingerprints) == 5


def test_fingerprint_depends_on_the_version_of_the_selector(pocket, few_samples, monkeypatch):
    """A selector that chooses otherwise than it did must not read what was measured before."""
    selector = make_selector("cls_attention")
    before = teacher_module.teacher_fingerprint(pocket, few_samples, selector, 6, "teacher")
    monkeypatch.setattr(type(selector), "version", 7)
    assert teacher_module.teacher_fingerprint(pocket, few_samples, selector, 6, "teacher") != before


@pytest.mark.parametrize("damage", ["truncate", "garbage", "foreign"])
@pytest.mark.fast_cases(1)
def test_a_damaged_cache_is_an_error_that_names_the_file(pocket, few_samples, tmp_path, damage):
    selector = make_selector("cls_attention")
    make_teacher(pocket, few_samples, selector, **OPTIONS, cache_dir=tmp_path)
    (path,) = tmp_path.glob("teacher-*.safetensors")
    if damage == "truncate":
        path.write_bytes(path.read_bytes()[:-1000])
    elif damage == "garbage":
        path.write_bytes(b"not a safetensors file at all")
    else:
        make_teacher(pocket, few_samples, make_selector("uniform_grid"), **OPTIONS, cache_dir=tmp_path / "other")
        (foreign,) = (tmp_path / "other").glob("teacher-*.safetensors")
        path.write_bytes(foreign.read_bytes())
    with pytest.raises(CacheError, match=r"teacher-.*(corrupt|belongs to another).*delete it"):
        make_teacher(pocket, few_samples, selector, **OPTIONS, cache_dir=tmp_path)


def test_nothing_half_written_is_left_when_the_model_fails(pocket, few_samples, tmp_path):
    weight = pocket.model.model.language_model.norm.weight
    original = weight.data.clone()
    try:
        weight.data[0] = torch.nan
        with pytest.raises(NumericalError, match=r"pocket/search.*not finite.*dtype"):
            make_teacher(pocket, few_samples, make_selector("cls_attention"), **OPTIONS, cache_dir=tmp_path)
    finally:
        weight.data.copy_(original)
    assert list(tmp_path.iterdir()) == []


def test_ground_truth_answers_are_teacher_forced(pocket, few_samples):
    teacher = make_teacher(pocket, few_samples, make_selector("cls_attention"), **OPTIONS, answers="ground_truth")
    for sample, known in zip(few_samples, teacher.samples, strict=True):
        text = pocket.processor.tokenizer.decode(known.answer_ids, skip_special_tokens=True)
        assert text.replace(" ", "").lower().startswith(sample.answers[0].replace(" ", "").lower()[:5])


@pytest.mark.parametrize(("end", "space"), [("ASSISTANT:", " "), ("<|im_start|>assistant\n", "")])
def test_an_annotated_answer_follows_the_prompt_as_it_ends(few_samples, monkeypatch, end, space):
    sample = few_samples.samples[0]
    asked = []

    def tokenize(text, **kwargs):
        asked.append(text)
        return {"input_ids": [ord(character) for character in text]}

    monkeypatch.setattr(teacher_module, "sample_prompt", lambda processor, sample: sample.question + end)
    loaded = SimpleNamespace(processor=SimpleNamespace(tokenizer=tokenize))
    ids = teacher_module.annotated_ids(loaded, sample)
    assert "".join(map(chr, ids)) == space + sample.answers[0]
    assert asked[-1] == sample.question + end + space + sample.answers[0]
    with pytest.raises(DataError, match=r"has no answer.*data\.answers=teacher"):
        teacher_module.annotated_ids(loaded, replace(sample, answers=()))


def test_fingerprint_depends_on_template_processor_and_configuration(pocket, few_samples, monkeypatch):
    def fingerprint():
        return teacher_module.teacher_fingerprint(pocket, few_samples, make_selector("cls_attention"), 6, "teacher")

    found = {fingerprint()}
    model_inputs(pocket.processor, few_samples.samples, torch.device("cpu"))  # leaves its padding in the tokenizer
    pocket.processor.tokenizer("one", padding=False, truncation=True, max_length=3)
    monkeypatch.setattr(pocket.model.config, "_name_or_path", "/elsewhere")  # the place of the files is no setting
    assert {fingerprint()} == found
    for owner, name, value in (
        (pocket.processor, "chat_template", pocket.processor.chat_template + " "),
        (pocket.processor.image_processor, "image_mean", [0.4, 0.5, 0.5]),
        (pocket.model.config, "vision_feature_layer", -2),
    ):
        monkeypatch.setattr(owner, name, value)
        found.add(fingerprint())
    assert len(found) == 4


def test_penalties_that_a_checkpoint_ships_do_not_change_its_answers(pocket, few_samples, teacher, monkeypatch):
    monkeypatch.setattr(pocket.model.generation_config, "repetition_penalty", 5.0)
    again = make_teacher(pocket, few_samples, make_selector("cls_attention"), **OPTIONS)
    assert [sample.answer_ids for sample in again.samples] == [sample.answer_ids for sample in teacher.samples]
