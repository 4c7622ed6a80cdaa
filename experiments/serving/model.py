"""A random model in the shape of LLaVA-1.5, with the pocket model's words: what serving is timed and tested on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from dop_search.models.pocket import pocket_path

IMAGE_SIZE, PATCH_SIZE = 336, 14
"""576 visual tokens, as LLaVA-1.5 has."""


def save_random_llava(
    folder: Path, num_layers: int, hidden_size: int, num_heads: int, num_kv_heads: int, tower_layers: int = 3
) -> Path:
    """Save it for ``from_pretrained``, in float32; the projector gets what the tower's last layer but one gives."""
    for file in pocket_path().glob("*"):
        if file.suffix in (".json", ".jinja") and file.name not in ("config.json", "training.json"):
            shutil.copy(file, folder / file.name)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["patch_size"] = PATCH_SIZE
    processor["image_processor"]["size"] = {"shortest_edge": IMAGE_SIZE}
    processor["image_processor"]["crop_size"] = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    (folder / "processor_config.json").write_text(json.dumps(processor))
    pocket = LlavaConfig.from_pretrained(pocket_path())
    text = LlamaConfig(
        vocab_size=pocket.text_config.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=int(2.75 * hidden_size) // 32 * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=4096,
        bos_token_id=pocket.text_config.bos_token_id,
        eos_token_id=pocket.text_config.eos_token_id,
        pad_token_id=pocket.text_config.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=tower_layers,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        projection_dim=128,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=pocket.image_token_index,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for name, parameter in model.named_parameters():  # larger than usual, so that answers depend on the image
        if parameter.ndim >= 2 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[-1] ** 0.5)
    model.save_pretrained(folder)
    return folder
