"""The two baselines of ``dop-bench`` against the pruned model: different code, the same function."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import pytest
import torch
from support.random_teacher import narrow

from dop_search.evaluation.timing.reductions import (
    dropped_by_hooks,
    evenly_spaced,
    kept_columns,
    reduced_before_decoder,
)
from dop_search.evaluation.timing.shapes import IMAGE_TOKEN_ID, SHAPES, build, prompt
from dop_search.pruning import pruned
from dop_search.strategy import Strategy
from dop_search.testing.measure import model_state, state_difference

LAYERS, KEPT = 4, 30


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def subject(request):
    torch.manual_seed(0)
    model = build(SHAPES["tiny"], torch.device("cpu"), torch.float32, request.param)
    with torch.no_grad():  # the usual initialisation leaves attention flat: make mistakes visible
        for parameter in model.parameters():
            parameter.mul_(3.0)
    inputs = prompt(SHAPES["tiny"], model, num_text=8, batch=2)
    visual = inputs["input_ids"] == IMAGE_TOKEN_ID
    ranking = np.argsort(~np.isin(np.arange(200), evenly_spaced(200, KEPT)), kind="stable")
    with torch.no_grad():
        model(**inputs, logits_to_keep=1)  # on its first call transformers installs hooks of its own
    return model, inputs, kept_columns(visual, KEPT), [ranking, ranking]


def answers(model, inputs, context):
    """Logits of the prompt's last token and of each generated one ``[tokens, vocabulary]``."""
    with context, torch.no_grad():
        output = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    return torch.stack(output.logits)


def test_reducing_before_the_decoder_is_the_strategy_of_fewer_tokens(subject):
    model, inputs, columns, ranking = subject
    strategy = Strategy.full(LAYERS, num_visual_tokens=KEPT, selector="explicit")
    before = model_state(model)
    plain = answers(model, inputs, reduced_before_decoder(model, columns, inputs["input_ids"].shape[1]))
    assert not state_difference(before, model_state(model))
    torch.testing.assert_close(plain, answers(model, inputs, pruned(model, strategy, ranking)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, answers(model, inputs, nullcontext()), atol=1e-2)


@pytest.mark.parametrize("layer", [1, 2])
def test_dropping_by_hooks_is_the_strategy_of_a_group_that_leaves(subject, layer):
    model, inputs, columns, ranking = subject
    kept, dropped = LAYERS, layer
    strategy = Strategy.depthwise(
        LAYERS, [kept, dropped], [kept, dropped], [kept, dropped], shares=[KEPT / 200, 1 - KEPT / 200]
    )
    # the hooks compute the dead operations of the dropped group's last layer too, which change nothing
    before = model_state(model)
    plain = answers(model, inputs, dropped_by_hooks(model, columns, inputs["input_ids"].shape[1], layer))
    assert not state_difference(before, model_state(model))
    torch.testing.assert_close(plain, answers(model, inputs, pruned(model, strategy, ranking)), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(plain, answers(model, inputs, nullcontext()), atol=1e-2)


@pytest.mark.parametrize(("visual", "kept"), [(10, 10), (10, 3), (576, 1), (7, 0)])
def test_evenly_spaced_are_so_many_different_tokens(visual, kept):
    chosen = evenly_spaced(visual, kept)
    assert len(set(chosen.tolist())) == kept
    assert all(0 <= index < visual for index in chosen)
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


@pytest.mark.parametrize(
    "name", ["llava_1_5_7b", "llava_1_5_13b", "llava_next_7b", "qwen2_5_vl_7b", "internvl3_8b", "small"]
)
def test_every_shape_is_a_model_that_sees_its_visual_tokens(name):
    """At a small width, with one image or tile: the tower is slow at the real resolution."""
    shape = SHAPES[name]
    fields = {"num_images": 1, "num_visual": shape.num_visual // shape.num_images}
    small = narrow(shape, layers=3, hidden=64, vocabulary=256, **fields)
    model = build(small, torch.device("cpu"), torch.float32)
    inputs = prompt(small, model, num_text=5)
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    with torch.inference_mode():
        model(**inputs, logits_to_keep=1)
    handle.remove()
    is_image = inputs["input_ids"][0] == IMAGE_TOKEN_ID
    embedded = model.get_input_embeddings()(torch.tensor([IMAGE_TOKEN_ID]))
    assert int(is_image.sum()) == small.num_visual
    assert not torch.isclose(seen[0][0, is_image], embedded).all(dim=1).any(), "an image token was not replaced"
