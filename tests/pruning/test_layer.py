"""Shortcuts of a layer that must not change what it computes."""

from __future__ import annotations

import pytest
import torch
from support.tiny_inputs import tiny_inputs
from support.tiny_models import tiny_model
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from dop_search.models import FAMILIES, adapter_for
from dop_search.pruning import prune_, pruned
from dop_search.pruning.attention import bottom_right_causal, lower_right
from dop_search.pruning.layer import PLAIN_RMS_NORMS, normalize
from dop_search.strategy import Strategy
from dop_search.testing.sizes import IMAGE_TOKEN_ID
from dop_search.utils.errors import DopError


def norms_of(model_type: str) -> list[nn.Module]:
    layer = adapter_for(tiny_model(model_type)).layers[0]
    return [module for module in layer.modules() if "Norm" in type(module).__name__]


OTHER_NORMS = ("gemma3", "gemma4", "qwen3_5", "qwen3_5_moe", "minicpmv4_6", "minicpmv4_7", "minicpm_ocr")
"""Families whose norms multiply in float32, or add one to their weights: they are called as they are."""


@pytest.mark.parametrize("model_type", [model_type for model_type in FAMILIES if model_type not in OTHER_NORMS])
def test_every_familys_norms_are_fused_and_the_same(model_type: str) -> None:
    norms = norms_of(model_type)
    assert norms
    assert {type(norm).__name__ for norm in norms} <= PLAIN_RMS_NORMS
    for norm in norms:
        x = torch.randn(7, norm.weight.shape[0], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(normalize(norm, x), norm(x), rtol=1e-6, atol=1e-6)


def test_a_hooked_norm_is_called() -> None:
    (norm, *_) = norms_of("llava")
    seen = []
    handle = norm.register_forward_hook(lambda module, args, output: seen.append(output))
    normalize(norm, torch.ones(2, norm.weight.shape[0]))
    handle.remove()
    assert len(seen) == 1


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_lower_right_attention_is_causal_from_the_bottom_right(kv_heads: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 5, 8, generator=generator)
    key, value = (torch.randn(2, kv_heads, 11, 8, generator=generator) for _ in range(2))
    result = lower_right(query, key, value, {"dropout": 0.0, "scaling": 0.3})
    repeated = [part.repeat_interleave(4 // kv_heads, dim=1) for part in (key, value)]
    mask = bottom_right_causal(5, 11, query.device)
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(result, expected)


STRATEGY = Strategy.depthwise(4, 2, 3, 2, num_visual_tokens=8, selector="random")


def test_autocast_runs_pruned_layers_too() -> None:
    model = tiny_model("llava")
    inputs = tiny_inputs(model)
    text = (inputs["input_ids"] != IMAGE_TOKEN_ID) & inputs["attention_mask"].bool()
    with torch.no_grad(), pruned(model, STRATEGY):
        exact = model(**inputs).logits[text]
        with torch.autocast("cpu", torch.bfloat16):
            rounded = model(**inputs).logits[text].float()
    assert (rounded - exact).abs().max() < 0.1 * exact.abs().max()


def test_training_after_inference_in_one_context() -> None:
    model = tiny_model("llava")
    inputs = tiny_inputs(model)
    with pruned(model, STRATEGY):
        with torch.inference_mode():
            model(**inputs)
        model(**inputs).logits[:, -1].sum().backward()
    assert model.get_input_embeddings().weight.grad is not None


def test_no_rankings_are_an_error_of_their_own() -> None:
    with pytest.raises(DopError, match="one entry per sample of the batch"):
        prune_(tiny_model("llava"), STRATEGY, rankings=[])
