"""Decoders and attention backends that pruned layers cannot stand in for are refused; wrapped models are unwrapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.tiny_inputs import tiny_inputs, tiny_sample
from support.tiny_models import tiny_llava
from transformers import (
    AutoModelForImageTextToText,
    GemmaConfig,
    GraniteConfig,
    LlavaConfig,
    MistralConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
    SmolLM3Config,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import dop_search as dop
from dop_search.models import adapter_for
from dop_search.testing.models import randomize_
from dop_search.testing.sizes import IMAGE_TOKEN_ID, TinySizes
from dop_search.utils.errors import DopError, UnsupportedModelError

TEXT = TinySizes().text()
REORDERED = dop.Strategy.full(4, num_visual_tokens=16, selector="random")
"""Nothing is skipped, but the packed layers run."""


def llava_over(text: PretrainedConfig) -> PreTrainedModel:
    vision = tiny_llava().config.vision_config.to_dict()
    config = LlavaConfig(vision_config=vision, text_config=text.to_dict(), image_token_index=IMAGE_TOKEN_ID)
    model: Any = AutoModelForImageTextToText.from_config(config, attn_implementation="sdpa")
    randomize_(model, 0)
    model.eval()
    return model  # type: ignore[no-any-return]


def text_logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    keep = (inputs["input_ids"] != IMAGE_TOKEN_ID) & inputs["attention_mask"].bool()
    with torch.no_grad():
        return model(**inputs).logits[keep]  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "text",
    [
        lambda: GemmaConfig(**TEXT, head_dim=8),
        lambda: MistralConfig(**TEXT, sliding_window=None),
        lambda: Qwen2Config(**TEXT),
        lambda: Qwen3Config(**TEXT, head_dim=8),
    ],
    ids=["gemma", "mistral", "qwen2", "qwen3"],
)
def test_known_decoders_compute_the_same_on_packed_rows(text: Callable[[], PretrainedConfig]) -> None:
    model = llava_over(text())
    inputs = tiny_inputs(model)
    full = text_logits(model, inputs)
    with dop.pruned(model, REORDERED):
        torch.testing.assert_close(text_logits(model, inputs), full, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (lambda: GraniteConfig(**TEXT, residual_multiplier=0.3), "GraniteDecoderLayer.*decoder_layers"),
        (lambda: SmolLM3Config(**TEXT), "SmolLM3DecoderLayer"),
        (lambda: MistralConfig(**TEXT, sliding_window=8), "sliding_window=8.*changes nothing"),
        (lambda: Qwen2Config(**TEXT, use_sliding_window=True, sliding_window=8, max_window_layers=2), "sliding"),
    ],
    ids=["granite", "smollm3", "mistral with a window", "qwen2 with a window"],
)
def test_other_arithmetic_is_refused(text: Callable[[], PretrainedConfig], named: str) -> None:
    with pytest.raises(UnsupportedModelError, match=named):
        adapter_for(llava_over(text()))


def test_other_attention_backends_are_refused() -> None:
    model = tiny_llava()
    model.set_attn_implementation("flex_attention")
    with pytest.raises(UnsupportedModelError, match=r"'flex_attention' is not supported.*set_attn_implementation"):
        dop.prune_(model, REORDERED)


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_flash_kernels_get_no_masks(name: str) -> None:
    masks: list[object] = []

    def kernel(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        masks.append(mask)
        if query.shape[2] == key.shape[2] or query.shape[2] == 1:
            return sdpa_attention_forward(module, query, key, value, mask, **kwargs)
        triangle = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril(key.shape[2] - query.shape[2])
        return sdpa_attention_forward(module, query, key, value, triangle[None, None], **{**kwargs, "is_causal": False})

    model = tiny_llava()
    inputs = tiny_sample(model)
    strategy = dop.Strategy.depthwise(4, 2, 3, 2, num_visual_tokens=8, selector="random")
    with dop.pruned(model, strategy), torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=3)
    ALL_ATTENTION_FUNCTIONS.register(name, kernel)
    model.model.language_model.config._attn_implementation = name
    with dop.pruned(model, strategy), torch.no_grad():
        assert torch.equal(model.generate(**inputs, max_new_tokens=3), expected)
    assert masks
    assert set(masks) == {None}


def test_a_model_that_peft_has_wrapped() -> None:
    peft = pytest.importorskip("peft")
    model = tiny_llava()
    inputs = tiny_inputs(model)
    lora = peft.LoraConfig(target_modules=r".*language_model.*\.(q_proj|v_proj)", r=2, init_lora_weights=False)
    wrapped = peft.get_peft_model(model, lora).eval()
    strategy = dop.Strategy.depthwise(4, 2, 3, 2, num_visual_tokens=8, selector="random")
    with dop.pruned(wrapped.get_base_model(), strategy):
        expected = text_logits(wrapped, inputs)
    with dop.pruned(wrapped, strategy):
        assert torch.equal(text_logits(wrapped, inputs), expected)
        with pytest.raises(DopError, match="already pruned"):
            dop.prune_(wrapped, strategy)
    assert not torch.equal(text_logits(wrapped, inputs), expected)
