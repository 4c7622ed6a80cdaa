"""Checkpoints that are damaged or at odds with themselves: one sentence instead of random weights or a traceback."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.tiny_families import tiny_processor
from support.tiny_models import tiny_model

import dop_search as dop
from dop_search.models import FAMILIES
from dop_search.models.fingerprint import weights_fingerprint
from dop_search.models.pocket import POCKET_VARIANTS, pocket_path
from dop_search.utils.errors import CheckpointError, DopError, UnsupportedModelError

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0a1b\nsize 21800000\n"
COMMITTED = {
    "deep": "042d11973df33a13",
    "shallow": "4a0b825d2c54e626",
    "stretched": "7c7be1b4ecec6467",
    "describing": "df960d7019241302",
}
"""Fingerprints of the bundled weights, under which caches of the published measurements are kept."""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny checkpoint of each family, on disk once."""
    folders = {}

    def save(family):
        if family not in folders:
            folders[family] = tmp_path_factory.mktemp(family)
            tiny_model(family).save_pretrained(folders[family])
            tiny_processor(family).save_pretrained(folders[family])
        return folders[family]

    return save


@pytest.fixture
def pocket_copy(tmp_path):
    return Path(shutil.copytree(pocket_path(), tmp_path / "model"))


def refused(folder, match, kind=CheckpointError):
    with pytest.raises(kind, match=match):
        dop.load(str(folder), device="cpu")


def edit_config(folder, section, file="config.json", **values):
    path = folder / file
    config = json.loads(path.read_text())
    (config if section is None else config[section]).update(values)
    path.write_text(json.dumps(config))


def edit_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def without(part):
    return lambda weights: {name: value for name, value in weights.items() if part not in name}


# -- weights and configuration at odds ------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_missing_and_left_over_weights_of_every_family_are_named(family, saved, tmp_path):
    folder = Path(shutil.copytree(saved(family), tmp_path / family))
    own = json.loads((folder / "config.json").read_text())["text_config"].get("layer_types", ["full_attention"] * 4)
    depths = ((5, r"are missing: .*layers\.4\."), (3, r"are left over: .*layers\.3\."))
    if family != "llava":
        depths = () if family == "gemma4" else depths[1:]  # whose configuration has sizes for each layer
    for layers, match in depths:
        edit_config(folder, "text_config", num_hidden_layers=layers, layer_types=[*own, own[-1]][:layers])
        refused(folder, rf"do not fit its config.json: \d+ {match}")
    shutil.copy(saved(family) / "config.json", folder)
    edit_weights(folder, without("layers.1.post_attention_layernorm.weight" if family != "lfm2_vl" else "layers.1.ffn"))
    refused(folder, r"[12] are missing: .*layers\.1\.(post_attention_layer|ffn_)norm\.weight\.")


def test_a_checkpoint_without_its_projector_is_refused(pocket_copy):
    edit_weights(pocket_copy, without("multi_modal_projector"))
    refused(pocket_copy, r"4 are missing: .*multi_modal_projector\.linear_1\.bias.* and 1 more")


def test_everything_that_does_not_fit_is_in_one_message(pocket_copy):
    def change(weights):
        name = next(name for name in weights if name.endswith("embed_tokens.weight"))
        return {**without("layers.3.mlp.up_proj")(weights), name: torch.zeros(3, 3), "extra.weight": torch.zeros(2)}

    edit_weights(pocket_copy, change)
    refused(pocket_copy, r"1 are missing: .*; 1 are left over: extra.weight; 1 have another shape: .*\(stored \[3, 3\]")


def test_tied_weights_and_what_old_versions_saved_are_no_fault(pocket_copy):
    """``inv_freq`` and ``position_ids`` were buffers of the files of transformers 4."""
    edit_weights(
        pocket_copy,
        lambda weights: {
            **weights,
            "model.language_model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(3),
            "model.vision_tower.embeddings.position_ids": torch.zeros(1, 3, dtype=torch.long),
        },
    )
    assert dop.load(str(pocket_copy), device="cpu").weights_fingerprint == COMMITTED["deep"]
    model = tiny_model("qwen2_vl")
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = True
    model.tie_weights()
    folder = pocket_copy.parent / "tied"
    model.save_pretrained(folder)
    tiny_processor("qwen2_vl").save_pretrained(folder)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    dop.load(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("section", "values", "match"),
    [
        ("text_config", {"num_hidden_layers": 10**9}, r"num_hidden_layers=1000000000, but only 201 tensors"),
        ("text_config", {"vocab_size": 128_000}, r"of [\d,]+ weights, but only [\d,]+ are stored"),
        (None, {"text_config": None}, r"of [\d,]+ weights, but only [\d,]+ are stored"),
        ("text_config", {"num_hidden_layers": "12"}, r"Validation error for field 'num_hidden_layers'"),
        ("text_config", {"num_attention_heads": 0}, r"ZeroDivisionError"),
        (None, {"model_type": [1]}, r"config.json"),
        (None, {"return_dict": False}, r"config.json says return_dict=false"),
        ("text_config", {"return_dict": False}, r"its text_config says return_dict=false"),
        (None, {"image_token_index": 7}, r"puts no image token of the model into a prompt"),
    ],
)
def test_a_configuration_that_cannot_be_the_model_s(section, values, match, pocket_copy):
    edit_config(pocket_copy, section, **values)
    refused(pocket_copy, match)


@pytest.mark.parametrize("kind", ["pixtral", "siglip2_vision_model"])
def test_a_llava_with_another_tower_is_refused_before_its_weights_are_read(kind, pocket_copy):
    edit_config(pocket_copy, None, vision_config={"model_type": kind})
    refused(pocket_copy, rf"vision tower '{kind}'.* is not covered; covered are clip", UnsupportedModelError)


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors", "torchao"])
def test_a_quantised_checkpoint_names_the_package_that_it_needs(method, pocket_copy):
    settings = {"quant_method": method, "bits": 4, "group_size": 128}
    if method == "bitsandbytes":
        settings["load_in_4bit"] = True
    edit_config(pocket_copy, None, quantization_config=settings)
    refused(pocket_copy, r"needs a package that is not installed .*; install it")


# -- damaged files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "content", "match"),
    [
        ("model.safetensors", LFS_POINTER, r"git-LFS pointers instead of files \(model.safetensors\).*git lfs pull"),
        ("tokenizer.json", LFS_POINTER, r"git-LFS pointers instead of files \(tokenizer.json\)"),
        ("model.safetensors", "", r"model.safetensors is empty; download it again"),
        ("model.safetensors", "x" * 100, r"model.safetensors is truncated or damaged"),
        ("model.safetensors", None, r"has no weights \(model.safetensors or"),
        ("config.json", "[]", r"config.json must be a JSON object, but is list"),
        ("config.json", "[" * 20_000, r"config.json is not JSON \(RecursionError"),
        ("generation_config.json", '{"eos_token_id": "2"}', r"eos_token_id='2', which is no number of a token"),
        ("generation_config.json", "", r"generation_config.json is not JSON"),
        ("tokenizer.json", "{", r"JSONDecodeError.*download or copy"),
        ("tokenizer.json", "[]", r"a file is missing, damaged or of another checkpoint"),
        ("tokenizer.json", None, r"a file is missing, damaged or of another checkpoint"),
        ("tokenizer_config.json", "{}", r"no padding token; set pad_token in tokenizer_config.json"),
        ("processor_config.json", "{}", r"a file is missing, damaged or of another checkpoint"),
        ("chat_template.jinja", None, r"no chat template; add chat_template.jinja"),
        ("chat_template.jinja", "{% for x in %}", r"TemplateSyntaxError.*a file is missing, damaged"),
        ("chat_template.jinja", "USER: <image> ASSISTANT:", r"drops the question 'What is this, in three words\?'"),
        (
            "chat_template.jinja",
            "{% for c in messages[0].content %}{{ c.text }}{% endfor %}",
            r"0 <image> tokens and 1 images",
        ),
    ],
)
@pytest.mark.fast_cases(4)
def test_a_damaged_file_is_one_sentence(file, content, match, pocket_copy):
    if content is None:
        (pocket_copy / file).unlink()
    else:
        (pocket_copy / file).write_text(content)
    refused(pocket_copy, match)


@pytest.mark.parametrize(
    ("file", "section", "values", "match"),
    [
        ("processor_config.json", None, {"patch_size": 3}, r"room for 1\d+ visual tokens where .* gives 256"),
        (
            "processor_config.json",
            "image_processor",
            {"size": {"height": 48, "width": 48}, "crop_size": {"height": 48, "width": 48}},
            r"Input image size \(48\*48\) doesn't match model \(96\*96\)",
        ),
        ("config.json", None, {"vision_feature_layer": 99}, "IndexError"),
        ("config.json", None, {"vision_feature_layer": 0}, "TypeError"),
    ],
)
def test_a_processor_of_another_tower_is_named(file, section, values, match, pocket_copy):
    """Found out at loading, by one image."""
    edit_config(pocket_copy, section, file, **values)
    refused(pocket_copy, rf"{match}.*compare vision_feature_layer and .* patch_size")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.float8_e4m3fn])
def test_weights_of_another_kind_are_not_cast_without_a_word(dtype, pocket_copy):
    name = "language_model.model.layers.3.mlp.down_proj.weight"
    edit_weights(pocket_copy, lambda weights: {**weights, name: weights[name].to(dtype)})
    refused(pocket_copy, r"1 weights are stored as \w+ without a quantization_config: .*layers\.3\.mlp\.down_proj")


def test_a_tower_that_takes_pixels_of_its_own_dtype_runs_in_float32_alone(saved):
    with pytest.raises(UnsupportedModelError, match=r"takes pixels in the dtype.*use model\.dtype=float32"):
        dop.load(str(saved("aria")), device="cpu", dtype="bfloat16")


def test_truncated_weights_are_refused(pocket_copy):
    whole = (pocket_copy / "model.safetensors").read_bytes()
    (pocket_copy / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    refused(pocket_copy, r"model.safetensors is truncated or damaged")


def test_shards_that_are_missing_are_named(pocket_copy):
    weights = load_file(pocket_copy / "model.safetensors")
    (pocket_copy / "model.safetensors").rename(pocket_copy / "model-1.safetensors")
    index = pocket_copy / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(weights, "model-1.safetensors")}))
    assert dop.load(str(pocket_copy), device="cpu").weights_fingerprint == COMMITTED["deep"]
    index.write_text(json.dumps({"weight_map": {**dict.fromkeys(weights, "model-1.safetensors"), "x": "model-2"}}))
    refused(pocket_copy, r"of 2 files of weights 1 are missing: model-2")
    index.write_text(json.dumps({"weight_map": {"x": 3}}))
    refused(pocket_copy, r"has no `weight_map` of files")


class _Opened:
    """Says so if it is ever unpickled."""

    def __reduce__(self):
        return Path.touch, (Path("unpickled"),)


def test_pickled_weights_are_never_opened(pocket_copy, monkeypatch):
    monkeypatch.chdir(pocket_copy.parent)
    (pocket_copy / "model.safetensors").unlink()
    torch.save({"a": _Opened()}, pocket_copy / "pytorch_model.bin")
    refused(pocket_copy, r"pickled \(pytorch_model.bin\), .* can run code; convert them to safetensors")
    assert not Path("unpickled").exists()


def test_an_adapter_alone_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    refused(tmp_path, r"holds a peft adapter, not a model; .*merge_and_unload")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"device_map": "foo"}, r"`device_map` must be one of auto, .* but got 'foo'"),
        ({"device": "foo"}, r"`device` must be auto, cpu or cuda.* but got 'foo'"),
        ({"device": "cuda:77"}, r"`device` must be .* of this machine, but got 'cuda:77'"),
    ],
)
def test_a_place_that_is_not_there(options, match):
    with pytest.raises(DopError, match=match):
        dop.load("pocket", **options)


# -- fingerprints ---------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", POCKET_VARIANTS)
def test_the_fingerprints_of_the_bundled_weights_stay(variant):
    assert dop.load(f"pocket/{variant}", device="cpu").weights_fingerprint == COMMITTED[variant]


def test_saved_buffers_are_part_of_the_fingerprint_and_computed_ones_are_not():
    """GPTQ and AWQ keep their packed weights in integer buffers; float32 would not tell these two apart."""
    model = tiny_model("llava")
    plain = weights_fingerprint(model)
    projection = model.model.language_model.layers[0].mlp.up_proj
    projection.register_buffer("computed", torch.zeros(3), persistent=False)
    assert weights_fingerprint(model) == plain
    projection.register_buffer("qweight", torch.full((8, 8), 2**30, dtype=torch.int32))
    packed = weights_fingerprint(model)
    projection.qweight += 1
    assert len({plain, packed, weights_fingerprint(model)}) == 3


# -- any damage -----------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**12) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def leaves(value, path=()):
    if isinstance(value, dict):
        for key, item in value.items():
            yield (*path, key)
            yield from leaves(item, (*path, key))


@pytest.mark.slow
@settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_damage_is_refused_in_words_or_harmless(data, saved, tmp_path_factory):
    """Whatever loads has every weight of the file: its fingerprint is the undamaged model's, or its numbers differ."""
    folder = Path(shutil.copytree(saved("llava"), tmp_path_factory.mktemp("fuzz") / "model"))
    file = folder / data.draw(st.sampled_from(sorted(path.name for path in folder.iterdir())))
    content = file.read_bytes()
    if file.suffix == ".json" and data.draw(st.booleans()):
        tree = json.loads(content)
        path = data.draw(st.sampled_from(list(leaves(tree))))
        place = tree
        for key in path[:-1]:
            place = place[key]
        if data.draw(st.booleans()):
            place[path[-1]] = data.draw(JSON)
        else:
            del place[path[-1]]
        content = json.dumps(tree).encode()
    elif data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    else:
        at = data.draw(st.integers(0, min(len(content), 4000) - 1))
        content = content[:at] + data.draw(st.binary(max_size=8)) + content[at + data.draw(st.integers(0, 8)) :]
    file.write_bytes(content)
    try:
        loaded = dop.load(str(folder), device="cpu")
    except DopError:
        return
    stored = {name: tuple(value.shape) for name, value in load_file(folder / "model.safetensors").items()}
    assert sum(p.numel() for p in loaded.model.parameters()) == sum(
        torch.Size(shape).numel() for shape in stored.values()
    )
