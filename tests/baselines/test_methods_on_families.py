"""What methods read of a model holds for every family: towers of any kind, decoders with deepstack."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from support.tiny_inputs import tiny_sample
from support.tiny_models import tiny_model

from dop_search.baselines import FitContext
from dop_search.baselines.fitprune import inputs_of, layer_views
from dop_search.baselines.short_lvlm import ShortLvlm
from dop_search.divergence.encoding import encode
from dop_search.models import FAMILIES, adapter_for
from dop_search.models.closed_towers import ClosedTowerAdapter
from dop_search.models.families import adapter_class
from dop_search.models.prompts import with_answer
from dop_search.selectors import SelectionSizes, make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.operations import TokenCounts

ANSWER = (7, 8, 9)


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if not issubclass(adapter_class(name, name), ClosedTowerAdapter)]
)
def test_selections_are_priced_whatever_the_tower_is(family: str) -> None:
    adapter = adapter_for(tiny_model(family))
    loaded = SimpleNamespace(adapter=adapter)
    counts = (TokenCounts(8, 16),)
    pricing = FitContext(adapter.dims, counts, loaded=loaded).pricing  # type: ignore[arg-type]
    patches = 16 * adapter.patches_per_token
    assert pricing.vision_width == adapter.tower_width == 16
    singly = {"llava", "llava_next", "llava_next_video", "llava_onevision", "vipllava", "video_llava", "video_llama_3"}
    singly |= {"deepseek_vl", "deepseek_vl_hybrid", "janus"}
    assert adapter.patches_per_token == (1 if family in singly else 4)
    fewer = Strategy.full(adapter.dims.num_layers, num_visual_tokens=8, selector="received_attention")
    asked = pricing.selection_ratio(fewer) * pricing.cost_model.full_total
    assert asked == pytest.approx(2 * patches * 16 * (2 * 16 + patches))


@pytest.mark.parametrize(
    "family", [name for name in FAMILIES if not adapter_class(name, name).layer_types]
)  # else refused
def test_states_are_the_full_models(family: str) -> None:
    model = tiny_model(family)
    adapter, inputs = adapter_for(model), tiny_sample(model)
    with torch.inference_mode():
        encoded = encode(adapter, inputs, ANSWER, make_selector("uniform_grid"))
        states = inputs_of([adapter.final_norm], adapter, encoded, None)[0]
        logits = adapter.lm_head(adapter.text_model.norm(states))
        expected = model(**with_answer(inputs, torch.tensor([ANSWER[:-1]]))).logits[0]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
        length = encoded.prompt_length
        prompt_states = encode(adapter, inputs, ANSWER[:1], make_selector("uniform_grid"))
        entering = layer_views(adapter, encoded)[0][-1].hidden
        seen = []
        handle = adapter.layers[-1].register_forward_pre_hook(lambda module, args: seen.append(args[0][0]))
        model(**inputs)
        handle.remove()
    assert len(prompt_states.embeds) == length
    torch.testing.assert_close(entering, seen[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llava", "qwen3_vl", "glm46v"])  # plain, with norms of heads, rotated in pairs
def test_attention_inside_the_decoder_is_the_models(family: str) -> None:
    model = tiny_model(family, attn_implementation="eager")
    adapter, inputs = adapter_for(model), tiny_sample(model)
    maps = []
    handles = [
        layer.self_attn.register_forward_hook(lambda module, args, output: maps.append(output[1][0]))
        for layer in adapter.layers
    ]
    with torch.inference_mode():
        encoded = encode(adapter, inputs, ANSWER[:1], make_selector("uniform_grid"))
        model(**inputs)
        for handle in handles:
            handle.remove()
        rows = torch.arange(encoded.prompt_length)
        found = [stage.attention(rows) for stage in layer_views(adapter, encoded)[0]]
    assert len(maps) == len(found)
    for its, expected in zip(found, maps, strict=True):
        torch.testing.assert_close(its, expected, rtol=1e-4, atol=1e-5)


def test_attention_that_is_asked_for_is_paid_for() -> None:
    dims = adapter_for(tiny_model("llava")).dims
    sizes = SelectionSizes(1296, 100, dims, dims.hidden_size, 1296)
    for name in ("visionzip", "vispruner", "holov"):
        row, every = (
            make_selector(name, {"attention": attention}).selection_flops(sizes) for attention in ("cls", "received")
        )
        assert every - row == 2 * 1296 * dims.hidden_size * (dims.hidden_size + 1296 - 1)


def test_short_lvlm_pays_for_the_selection() -> None:
    adapter = adapter_for(tiny_model("llava"))
    context = FitContext(adapter.dims, (TokenCounts(8, 16),), selector="divprune")
    method = ShortLvlm()
    chosen = Strategy.full(adapter.dims.num_layers, num_visual_tokens=8, selector="divprune")
    free = FitContext(adapter.dims, (TokenCounts(8, 16),), selector="random")
    paid = method.flops_ratio(context, 3, 8) - method.flops_ratio(free, 3, 8)
    assert paid == pytest.approx(context.pricing.selection_ratio(chosen))
    assert paid > 0
