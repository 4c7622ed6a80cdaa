"""The pocket model: tokenizer, processor, untrained weights, and how all of it is saved."""

from __future__ import annotations

import json
import re
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from shards import PATCH_PX
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from dop_search.data.rendered import rendered_questions
from dop_search.data.rendered.formats import FAMILY_BENCHMARKS, prompt
from dop_search.data.rendered.scenes import SIZE_PX

SYSTEM = "A chat about a picture."
CHAT_TEMPLATE = (
    SYSTEM + " {% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} "
    "{% elif message['role'] == 'assistant' %}ASSISTANT: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}</s> "
    "{% else %}{{ raise_exception('roles must be user or assistant, but got ' + message['role']) }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_EXTRA_WORDS = (
    *("yes", "no", "unanswerable", "describe", "list", "picture", "photo"),
    *("this", "that", "these", "an", "and", "or", "of", "in", "on", "to", "with"),
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Whole words for the words of the questions, single characters for everything else (signs are spelled)."""
    words: set[str] = set(_EXTRA_WORDS)
    chinese: set[str] = set()
    texts = [SYSTEM]
    for family, benchmarks in FAMILY_BENCHMARKS.items():
        for rendered in rendered_questions("train", 400, seed=0, families=[family]):
            texts += [prompt(rendered.question, benchmark) for benchmark in benchmarks]
            texts.append(rendered.question.answer)
    for text in texts:
        words.update(w for w in re.findall(r"[A-Za-z]+", text) if not (w.isupper() and w.isalpha()))
        chinese.update(c for c in text if ord(c) > 127)
    words |= {w.lower() for w in words} | {w.lower().capitalize() for w in words} | {"USER", "ASSISTANT"}
    characters = string.ascii_letters + string.digits
    vocabulary = [*_SPECIAL, *string.punctuation, *characters, *(f"##{c}" for c in characters)]
    vocabulary += sorted(chinese) + sorted(w for w in words if len(w) > 1)
    tokenizer = Tokenizer(models.WordPiece({t: i for i, t in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=False, strip_accents=False)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", vocabulary.index("<s>"))]
    )
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in _SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        model_max_length=1024,
        extra_special_tokens={"image_token": "<image>"},
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """CLIP-style image processor (96 px, mean and deviation one half) and tokenizer in a LLaVA processor."""
    images = CLIPImageProcessor(
        size={"shortest_edge": SIZE_PX},
        crop_size={"height": SIZE_PX, "width": SIZE_PX},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_PX,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    )


def build_model(tokenizer: PreTrainedTokenizerFast, seed: int, num_layers: int = 12) -> LlavaForConditionalGeneration:
    """An untrained model in float32: 5 vision layers of width 128, ``num_layers`` decoder layers of width 192."""
    torch.manual_seed(seed)
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        image_size=SIZE_PX,
        patch_size=PATCH_PX,
        projection_dim=128,
    )
    text = LlamaConfig(
        vocab_size=-(-len(tokenizer) // 16) * 16,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=num_layers,
        num_attention_heads=6,
        num_key_value_heads=6,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(SIZE_PX // PATCH_PX) ** 2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlavaForConditionalGeneration(config)


def load_weights(tokenizer: PreTrainedTokenizerFast, weights: Path) -> LlavaForConditionalGeneration:
    """The pocket model in float32 with exported weights (``model.safetensors``), as deep as they are.

    Raises:
        ValueError: the file lacks parameters of the pocket model, or has others.
    """
    with safe_open(weights, framework="pt") as file:
        found = [re.search(r"language_model\.(?:model\.)?layers\.(\d+)\.", name) for name in file.keys()]  # noqa: SIM118
    num_layers = 1 + max((int(match[1]) for match in found if match), default=0)
    with tempfile.TemporaryDirectory() as directory:  # from_pretrained translates the names that exporting changes
        build_model(tokenizer, seed=0, num_layers=num_layers).config.save_pretrained(directory)
        shutil.copyfile(weights, Path(directory) / "model.safetensors")
        model, info = LlavaForConditionalGeneration.from_pretrained(
            directory, dtype=torch.float32, output_loading_info=True
        )
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names}
    if wrong:
        raise ValueError(f"{weights} does not fit the pocket model: {wrong}")
    return model


@torch.no_grad()
def stretch(
    model: LlavaForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, num_layers: int
) -> LlavaForConditionalGeneration:
    """A deeper model: the last decoder layers twice in a row, both with half the output; a start for training.

    Raises:
        ValueError: ``num_layers`` is not between the model's number of layers and twice that.
    """
    config = model.config.text_config
    extra = num_layers - config.num_hidden_layers
    if not 0 <= extra <= config.num_hidden_layers:
        raise ValueError(
            f"`{config.num_hidden_layers} <= num_layers <= {2 * config.num_hidden_layers}` must hold, got {num_layers}"
        )
    first = config.num_hidden_layers - extra  # the first layer that is there twice
    source = [layer if layer < first else first + (layer - first) // 2 for layer in range(num_layers)]
    deeper = build_model(tokenizer, seed=0, num_layers=num_layers)
    old, new = model.model.language_model.layers, deeper.model.language_model.layers
    others = {name: value for name, value in model.state_dict().items() if ".language_model.layers." not in name}
    deeper.load_state_dict(others, strict=False)
    for layer, origin in enumerate(source):
        new[layer].load_state_dict(old[origin].state_dict())
        if origin >= first:
            new[layer].self_attn.o_proj.weight.mul_(0.5)
            new[layer].mlp.down_proj.weight.mul_(0.5)
    return deeper


def export(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, directory: Path, training: dict[str, Any]
) -> None:
    """Write what ``from_pretrained`` reads, weights in float16, plus ``training.json``."""
    directory.mkdir(parents=True, exist_ok=True)
    half = LlavaForConditionalGeneration(model.config)
    half.load_state_dict({name: tensor.detach().cpu().float() for name, tensor in model.state_dict().items()})
    half = half.half()
    half.generation_config = GenerationConfig(
        bos_token_id=processor.tokenizer.bos_token_id,
        eos_token_id=processor.tokenizer.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
        do_sample=False,
        max_new_tokens=48,
    )
    half.save_pretrained(directory)
    config = json.loads((directory / "config.json").read_text())
    config["dtype"] = "float32"  # stored in half precision, used in float32 unless the user says otherwise
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "model.safetensors").chmod(0o644)
    processor.save_pretrained(directory)
    (directory / "training.json").write_text(json.dumps(training, indent=2) + "\n")
