"""The bundled models: small, loadable without a network, right on new questions, and blind without the image."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from dop_search.data.rendered import FAMILIES, LONG_FAMILIES, rendered_samples
from dop_search.data.samples import score_answer
from dop_search.models.pocket import POCKET_VARIANTS, pocket_path
from dop_search.models.prompts import chat_prompt, model_inputs

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "pocket"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Several threads wait for each other on a busy machine longer than so small a model takes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=POCKET_VARIANTS)
def variant(request):
    return request.param


@pytest.fixture(scope="module")
def loaded(variant):
    path = pocket_path(variant)
    model, info = LlavaForConditionalGeneration.from_pretrained(
        path, local_files_only=True, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    return AutoProcessor.from_pretrained(path, local_files_only=True), model.eval()


@pytest.fixture(scope="module")
def samples():
    return rendered_samples("test", 2 * len(FAMILIES), seed=21)


@torch.inference_mode()
def answers(processor, model, samples, max_new_tokens):
    inputs = model_inputs(processor, samples, model.device)
    tokens = model.generate(**inputs, max_new_tokens=max_new_tokens)[:, inputs["input_ids"].shape[1] :]
    return processor.batch_decode(tokens, skip_special_tokens=True)


def share_right(processor, model, samples):
    """Long answers in a batch of their own: a batch takes as many steps as its longest answer."""
    right = 0
    for long, max_new_tokens in ((False, 6), (True, 24)):
        chosen = [sample for sample in samples if (sample.family == "describe") == long]
        texts = answers(processor, model, chosen, max_new_tokens)
        right += sum(score_answer(text, sample) for text, sample in zip(texts, chosen, strict=True))
    return right / len(samples)


def test_all_variants_together_fit_in_50_megabytes():
    files = [file for variant in POCKET_VARIANTS for file in pocket_path(variant).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 50e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".pkl")]


def test_weights_are_stored_in_half_precision(variant):
    with safe_open(pocket_path(variant) / "model.safetensors", framework="pt") as file:
        assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"F16"}  # noqa: SIM118


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match=r"must be one of \('deep', 'shallow', .*\), but got 'plain'"):
        pocket_path("plain")


def test_deep_and_shallow_differ_only_in_where_the_taps_were():
    """Same architecture, tokenizer and recipe, so that what differs between them is planted by the taps."""
    deep, shallow = pocket_path("deep"), pocket_path("shallow")
    for name in ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (deep / name).read_bytes() == (shallow / name).read_bytes()
    recipes = [json.loads((path / "training.json").read_text()) for path in (deep, shallow)]
    assert [recipe["taps"] for recipe in recipes] == [[6, 9], [2, 5]]
    differing = {name for name in recipes[0] if recipes[0][name] != recipes[1][name]}
    assert differing <= {"variant", "taps", "steps"}
    assert all(recipe["finished"] for recipe in recipes)


def test_stretched_is_deep_with_other_layers():
    deep, stretched = pocket_path("deep"), pocket_path("stretched")
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (deep / name).read_bytes() == (stretched / name).read_bytes()
    one, other = (json.loads((path / "config.json").read_text()) for path in (deep, stretched))
    assert other["text_config"]["num_hidden_layers"] == 18
    assert one["vision_config"] == other["vision_config"]
    assert json.loads((stretched / "training.json").read_text())["initial_weights"] == "deep"


@pytest.mark.slow
def test_describing_is_deep_trained_on_and_answers_at_length(variant, loaded):
    if variant != "describing":
        pytest.skip("the other variants give short answers")
    deep, describing = pocket_path("deep"), pocket_path("describing")
    for name in ("config.json", "tokenizer.json", "processor_config.json", "chat_template.jinja"):
        assert (deep / name).read_bytes() == (describing / name).read_bytes()
    assert json.loads((describing / "training.json").read_text())["initial_weights"] == "deep"
    processor, model = loaded
    asked = rendered_samples("test", 8, seed=21, families=LONG_FAMILIES)
    texts = answers(processor, model, asked, 96)
    assert min(len(processor.tokenizer(text, add_special_tokens=False).input_ids) for text in texts) >= 64
    right = 0
    for text, sample in zip(texts, asked, strict=True):
        pairs = zip(text.split(". "), sample.answers[0].split(". "), strict=True)
        right += sum(given == true for given, true in pairs)
    assert right >= 0.85 * 9 * len(asked)


def test_stretching_repeats_the_last_layers_at_half_their_output(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENT))
    import model as recipe

    tokenizer = AutoProcessor.from_pretrained(pocket_path("deep")).tokenizer
    small = recipe.build_model(tokenizer, seed=1)
    same = recipe.stretch(small, tokenizer, 12).state_dict()
    assert all(torch.equal(value, same[name]) for name, value in small.state_dict().items())
    before = small.model.language_model.layers
    after = recipe.stretch(small, tokenizer, 18).model.language_model.layers
    assert len(after) == 18
    for layer, (origin, share) in enumerate([*((i, 1.0) for i in range(6)), *((6 + i // 2, 0.5) for i in range(12))]):
        old, new = before[origin].state_dict(), after[layer].state_dict()
        for name, value in old.items():
            factor = share if name in ("self_attn.o_proj.weight", "mlp.down_proj.weight") else 1.0
            assert torch.equal(new[name], factor * value), (layer, name)
    with pytest.raises(ValueError, match=r"12 <= num_layers <= 24"):
        recipe.stretch(small, tokenizer, 30)


def test_an_image_becomes_256_visual_tokens_and_a_cls_token(variant, loaded, samples):
    processor, model = loaded
    inputs = model_inputs(processor, samples[:2], model.device)
    assert (inputs["input_ids"] == model.config.image_token_id).sum(dim=1).tolist() == [256, 256]
    with torch.inference_mode():
        tower = model.model.vision_tower(inputs["pixel_values"]).last_hidden_state
    assert tower.shape == (2, 257, 128)
    assert model.config.text_config.num_hidden_layers == (18 if variant == "stretched" else 12)
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight


def test_batches_are_padded_on_the_left(loaded, samples):
    mask = model_inputs(loaded[0], samples[:6], loaded[1].device)["attention_mask"]
    assert mask[:, -1].all()
    assert (mask.diff(dim=1) >= 0).all()


def test_every_prompt_and_answer_survives_the_tokenizer(loaded, samples):
    tokenizer = loaded[0].tokenizer
    for sample in samples:
        for text in (sample.question, sample.answers[0]):
            ids = tokenizer(text, add_special_tokens=False).input_ids
            assert tokenizer.unk_token_id not in ids
            assert "".join(tokenizer.decode(ids).split()) == "".join(text.split())
    assert tokenizer.decode(tokenizer("top left", add_special_tokens=False).input_ids) == "top left"
    assert tokenizer.decode(tokenizer("red ring, blue star", add_special_tokens=False).input_ids) == (
        "red ring, blue star"
    )


def test_chat_template_is_vicunas(loaded):
    processor, _ = loaded
    assert chat_prompt(processor, "What color is the ring?") == (
        "A chat about a picture. USER: <image>\nWhat color is the ring? ASSISTANT:"
    )
    turns = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "One?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": "Two?"},
    ]
    assert processor.apply_chat_template(turns, add_generation_prompt=True) == (
        "A chat about a picture. USER: <image>\nOne? ASSISTANT: yes</s> USER: Two? ASSISTANT:"
    )


@pytest.mark.slow
def test_new_questions_are_answered_and_only_with_the_image(variant, loaded, samples):
    """Two questions of every family (one for the other variants); guessing gets about a quarter."""
    processor, model = loaded
    if variant != "deep":
        assert share_right(processor, model, samples[: len(FAMILIES)]) >= 0.8
        return
    assert share_right(processor, model, samples) >= 0.85
    grey = [replace(sample, image=Image.new("RGB", (96, 96), (128, 128, 128))) for sample in samples]
    assert share_right(processor, model, grey) <= 0.45


@pytest.mark.slow
def test_the_training_forward_computes_what_the_hugging_face_model_computes(loaded, monkeypatch):
    """Several packed questions behind a block mask get the logits of single sequences."""
    monkeypatch.syspath_prepend(str(EXPERIMENT))
    import network
    import shards

    processor, model = loaded
    prefix = processor.tokenizer(shards.PREFIX).input_ids
    training = network.TrainingNetwork(model, prefix, compile_layers=False)
    row = shards.make_row(processor.tokenizer.backend_tokenizer, "test", 0, 3)
    batch = {name: torch.from_numpy(array)[None] for name, array in row.items()}
    pixels = processor.image_processor(Image.fromarray(row["image"]), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        states, _ = training(training.vision(batch["image"]), batch)
        packed = model.lm_head(states)[0]
    num_questions = int(row["segment"].max())
    assert num_questions >= 3
    for segment in range(1, num_questions + 1):
        (index,) = (batch["segment"][0] == segment).nonzero(as_tuple=True)
        tokens = torch.tensor([[*prefix, *[model.config.image_token_id] * 256, *row["tokens"][index.numpy()].tolist()]])
        with torch.inference_mode():
            logits = model(input_ids=tokens, pixel_values=pixels, attention_mask=torch.ones_like(tokens)).logits[0]
        torch.testing.assert_close(packed[index], logits[len(prefix) + 256 :], atol=2e-3, rtol=1e-4)
        answer = row["answer"][index.numpy()].nonzero()[0]
        assert (
            packed[index][answer - 1].argmax(-1).tolist() == logits[len(prefix) + 256 + answer - 1].argmax(-1).tolist()
        )
