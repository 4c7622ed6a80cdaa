"""What pruning does to the model object: threads, copies, hooks, outputs, gradient checkpointing, wrappers."""

from __future__ import annotations

import copy
import pickle
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch
from support.tiny_inputs import tiny_inputs, tiny_sample
from support.tiny_models import tiny_model

import dop_search as dop
from dop_search.testing.conformance.base import max_text_difference
from dop_search.testing.inputs import collate
from dop_search.testing.measure import model_state, state_difference
from dop_search.testing.reference import masked_forward, visual_positions, visual_token_ids
from dop_search.testing.strategies import corner_strategy, random_rankings
from dop_search.utils.errors import DopError, UnsupportedModelError

LAYERS = 4
model_of = cache(tiny_model)


def strategy(selector="uniform_grid", num_kept=8, **options):
    return dop.Strategy.depthwise(LAYERS, 2, 3, 1, num_kept, selector=selector, selector_options=options)


def answer(model, sample, **arguments):
    output = model.generate(
        **sample,
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
        suppress_tokens=[*visual_token_ids(model), *(model.generation_config.suppress_tokens or [])],
        **arguments,
    )
    return output[:, sample["input_ids"].shape[1] :].tolist()


# -- threads -------------------------------------------------------------------------------------------------------


@pytest.fixture
def many_switches():
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


@pytest.mark.parametrize(
    ("family", "selector"),
    [
        ("llava", "cls_attention"),
        ("llava", "tome"),
        ("llava", "resize"),
        ("llava", "fastv"),
        ("llava_next", "received_attention"),
        ("llava_onevision", "divprune"),
        ("qwen2_vl", "received_attention"),
        ("qwen2_5_vl", "received_attention"),
        ("qwen3_vl", "uniform_grid"),
        ("internvl", "received_attention"),
    ],
)
@pytest.mark.fast_cases(1)
def test_threads_get_the_answers_that_they_get_alone(family, selector, many_switches):
    """Samples of different images and lengths at the same time, on one pruned model."""
    model = tiny_model(family)
    samples = [tiny_sample(model, 2 + seed, 4, seed=seed, image_shape=seed % 3) for seed in range(4)]
    chosen = strategy(selector, 5)
    if selector == "fastv":
        chosen = dop.Strategy.depthwise(
            LAYERS, [4, 1], [4, 1], [4, 1], shares=[0.5, 0.5], selector="fastv", selector_options={"stages": [1]}
        )
    with dop.pruned(model, chosen):
        alone = [answer(model, sample) for sample in samples]
        assert len({str(tokens) for tokens in alone}) > 1
        with ThreadPoolExecutor(4) as pool:
            numbers = [number for _ in range(3) for number in range(4)]
            together = list(pool.map(lambda number: answer(model, samples[number]), numbers))
    assert together == [alone[number] for number in numbers]


def test_a_model_is_pruned_by_one_thread():
    model = tiny_model("llava")
    barrier = threading.Barrier(4)

    def enter(_):
        barrier.wait()
        try:
            return dop.prune_(model, strategy())
        except DopError as error:
            return str(error)

    before = model_state(model)
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(enter, range(4)))
    (handle,) = [result for result in results if not isinstance(result, str)]
    assert sum("already pruned" in str(result) for result in results) == 3
    handle.restore()
    assert state_difference(before, model_state(model)) == []


def test_restoring_under_a_running_answer_is_an_error_there():
    """Not an answer that is half the strategy's and half the model's."""
    model = tiny_model("llava")
    handle = dop.prune_(model, strategy())

    def restore(input_ids, scores):
        handle.restore()
        return scores

    with pytest.raises(DopError, match="filled by a pruned model"):
        answer(model, tiny_sample(model), logits_processor=[restore])


# -- copies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("selector", ["uniform_grid", "cls_attention", "tome", "resize", "fastv"])
def test_a_pruned_model_is_not_copied(selector, tmp_path):
    model = tiny_model("llava")
    options = {"stages": [0]} if selector == "fastv" else {}
    chosen = strategy(selector, None if options else 8, **options)
    with dop.pruned(model, chosen):
        for part in (model, model.model, model.model.language_model):
            for make in (copy.deepcopy, pickle.dumps, lambda it: torch.save(it, tmp_path / "model.pt")):
                with pytest.raises(DopError, match=r"cannot be copied or pickled.*prune the copy"):
                    make(part)
        if selector in ("cls_attention", "tome", "resize"):
            with pytest.raises(DopError, match="cannot be copied"):
                copy.deepcopy(model.model.vision_tower)


def test_a_copy_of_a_restored_model_stands_alone():
    model, inputs = tiny_model("llava"), tiny_inputs(model_of("llava"))
    with torch.no_grad():
        expected = model(**inputs).logits
        with dop.pruned(model, strategy("cls_attention")):
            pruned = model(**inputs).logits
        twin = copy.deepcopy(model)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(twin(**inputs).logits, expected)
        with dop.pruned(twin, strategy("cls_attention")):
            assert torch.equal(twin(**inputs).logits, pruned)


# -- hooks, outputs, replaced forwards -----------------------------------------------------------------------------


REGISTER = ("register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook")


@pytest.mark.parametrize("where", ["layers.2", "layers.1.self_attn"])
@pytest.mark.parametrize("register", REGISTER)
def test_hooks_that_would_not_fire_are_refused(where, register):
    model, inputs = tiny_model("llava"), tiny_inputs(model_of("llava"))
    module = model.model.language_model.get_submodule(where)
    name = "decoder layer 2" if where == "layers.2" else "the attention of decoder layer 1"
    with getattr(module, register)(lambda *_: None):
        before = model_state(model)
        with pytest.raises(DopError, match=f"hook on {name} would not fire"):
            dop.prune_(model, strategy())
        assert state_difference(before, model_state(model)) == []
    with dop.pruned(model, strategy()):
        model(**inputs)
        with getattr(module, register)(lambda *_: None), pytest.raises(DopError, match=f"hook on {name}"):
            model(**inputs)
        model(**inputs)


@pytest.mark.parametrize("part", ["mlp", "input_layernorm", "self_attn.o_proj"])
def test_hooks_on_parts_see_the_rows_that_run(part):
    """16 visual tokens of which 8 enter, queries in layers 0 and 1, an MLP in layer 0; 7 of text."""
    model, inputs = tiny_model("llava"), tiny_sample(model_of("llava"), 3, 4)
    seen = []
    layers = model.model.language_model.layers
    for layer in layers:
        layer.get_submodule(part).register_forward_hook(lambda module, args, output: seen.append(tuple(output.shape)))
    with torch.no_grad(), dop.pruned(model, strategy()):
        model(**inputs)
    width = model.config.text_config.hidden_size
    rows = {"mlp": [15, 7, 7, 7], "input_layernorm": [15, 15, 15, 7], "self_attn.o_proj": [15, 15, 7, 7]}[part]
    assert seen == [(count, width) for count in rows]


def test_hooks_that_transformers_leaves_behind_do_no_harm():
    model, inputs = tiny_model("llava"), tiny_inputs(model_of("llava"))
    with torch.no_grad(), dop.pruned(model, strategy()):
        expected = model(**inputs).logits
    with torch.no_grad():
        model(**inputs, output_hidden_states=True)
    assert model.model.language_model.layers[0]._forward_hooks
    with torch.no_grad(), dop.pruned(model, strategy()):
        assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("name", ["output_hidden_states", "output_attentions"])
def test_outputs_of_layers_are_refused_wherever_they_are_asked_for(name):
    model, inputs = tiny_model("llava", attn_implementation="eager"), tiny_inputs(model_of("llava"))
    for config in (model.config, model.config.text_config):
        setattr(config, name, True)
        with pytest.raises(DopError, match=rf"`{name}=True` in the Ll\w+Config is not available.*set it to False"):
            dop.prune_(model, strategy())
        setattr(config, name, False)
    with dop.pruned(model, strategy()):
        with pytest.raises(DopError, match=f"`{name}=True` is not available"):
            model(**inputs, **{name: True})
        setattr(model.config.text_config, name, True)
        with pytest.raises(DopError, match=f"`{name}=True` in the LlamaConfig"):
            model(**inputs)
        model(**inputs, **{name: False})


def test_a_replaced_forward_is_refused():
    model = tiny_model("llava")
    layer = model.model.language_model.layers[3]
    layer.forward = layer.forward
    with pytest.raises(DopError, match="forward of decoder layer 3 was replaced"):
        dop.prune_(model, strategy())


def test_the_empty_strategy_touches_nothing():
    model = tiny_model("llava")
    before = model_state(model)
    with dop.pruned(model, dop.Strategy.full(LAYERS)):
        assert state_difference(before, model_state(model)) == []
        copy.deepcopy(model)


# -- gradients -----------------------------------------------------------------------------------------------------


def backward(model, inputs):
    """Gradients of one loss, and the bytes that the forward kept for the backward pass."""
    kept = []

    def keep(tensor):
        kept.append(tensor.untyped_storage().nbytes() if not isinstance(tensor, torch.nn.Parameter) else 0)
        return tensor

    model.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(**inputs).logits[:, -1].square().mean()
    loss.backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()], sum(kept)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("family", ["llava", "qwen3_vl"])
def test_gradient_checkpointing_saves_memory_and_changes_no_gradient(family, use_reentrant):
    """What transformers keeps of its own layers is the measure: pruned layers are to keep as small a share."""
    model = tiny_model(family, 8).train()
    inputs = collate([tiny_sample(model, 30, 40)])
    if use_reentrant:
        model.enable_input_require_grads()
    chosen = dop.Strategy.depthwise(8, 6, 7, 5, selector="uniform_grid")
    kept = {}
    for pruned in (False, True):
        for checkpointing in (False, True):
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            with dop.pruned(model, chosen if pruned else dop.Strategy.full(8)):
                gradients, kept[pruned, checkpointing] = backward(model, inputs)
            model.gradient_checkpointing_disable()
            if not checkpointing:
                plain = gradients
            else:
                for gradient, expected in zip(gradients, plain, strict=True):
                    torch.testing.assert_close(gradient, expected)
    assert kept[True, True] / kept[True, False] < 1.2 * kept[False, True] / kept[False, False] < 0.6


def test_a_tower_that_runs_again_in_the_backward_pass_ranks_nothing():
    model, inputs = tiny_model("llava").train(), tiny_inputs(model_of("llava"))
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with dop.pruned(model, strategy("cls_attention")):
        gradients, _ = backward(model, inputs)
    model.gradient_checkpointing_disable()
    with dop.pruned(model, strategy("cls_attention")):
        expected, _ = backward(model, inputs)
    for gradient, same in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, same)


# -- wrappers ------------------------------------------------------------------------------------------------------


def test_wrappers_and_base_models_are_refused_with_the_way_out():
    model = tiny_model("llava")
    with pytest.raises(UnsupportedModelError, match=r"DataParallel is a wrapper.*pass its `model\.module`"):
        dop.prune_(torch.nn.DataParallel(model), strategy())
    with pytest.raises(UnsupportedModelError, match="LlavaModel is a base model without a language head"):
        dop.prune_(model.model, strategy())


def test_replicas_are_refused():
    """As DataParallel makes them on several devices."""
    model, inputs = tiny_model("llava"), tiny_inputs(model_of("llava"))
    with dop.pruned(model, strategy()):
        model.model._is_replica = True
        with pytest.raises(DopError, match="one process per device"):
            model(**inputs)


def test_lora_trains_through_a_pruned_model():
    peft = pytest.importorskip("peft")
    inputs = tiny_inputs(model_of("llava"))
    wrapped = peft.get_peft_model(tiny_model("llava"), peft.LoraConfig(target_modules=["q_proj", "v_proj"]))
    labels = inputs["input_ids"].where(inputs["input_ids"] != wrapped.config.image_token_id, -100)
    with dop.pruned(wrapped, strategy()):
        loss = wrapped(**inputs, labels=labels).loss
        loss.backward()
        tokens = wrapped.generate(**inputs, max_new_tokens=2)
    assert tokens.shape[1] == inputs["input_ids"].shape[1] + 2
    moved = [p.grad.abs().max() for n, p in wrapped.named_parameters() if "lora_B" in n and "language_model" in n]
    assert len(moved) == 2 * LAYERS
    assert min(moved) > 0
    merged = wrapped.merge_and_unload()
    with torch.no_grad(), dop.pruned(merged, strategy()):
        logits = merged(**inputs).logits
    with torch.no_grad(), dop.pruned(model_of("llava"), strategy()):
        assert max_text_difference(merged, inputs, logits, model_of("llava")(**inputs).logits) < 2e-5


def test_distributed_data_parallel_trains_a_pruned_module(tmp_path):
    """In a group of one process: the gradients are those without the wrapper."""
    model, inputs = tiny_model("llava"), tiny_inputs(model_of("llava"))
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
        with pytest.raises(UnsupportedModelError, match="DistributedDataParallel is a wrapper"):
            dop.prune_(wrapped, strategy())
        with dop.pruned(wrapped.module, strategy()):
            gradients, _ = backward(wrapped, inputs)
    finally:
        torch.distributed.destroy_process_group()
    plain = tiny_model("llava")
    with dop.pruned(plain, strategy()):
        expected, _ = backward(plain, inputs)
    for gradient, same in zip(gradients, expected, strict=True):
        torch.testing.assert_close(gradient, same)


class Int8Linear(torch.nn.Module):
    """Weights alone are quantised, as bitsandbytes, GPTQ and AWQ do; there is no `weight` to reach for."""

    def __init__(self, linear):
        super().__init__()
        self.scale = linear.weight.detach().abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("packed", (linear.weight.detach() / self.scale).round().to(torch.int8))
        self.bias = linear.bias

    def forward(self, rows):
        return torch.nn.functional.linear(rows, self.packed * self.scale, self.bias)


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_quantised_projections_are_called_as_they_are(family):
    model = tiny_model(family)
    inputs = tiny_inputs(model)
    plain = model(**inputs).logits
    for layer in model.model.language_model.layers:
        for block in (layer.self_attn, layer.mlp):
            for name, linear in list(block.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    setattr(block, name, Int8Linear(linear))
    rankings = random_rankings(visual_positions(model, inputs["input_ids"]).sum(dim=1).tolist(), 0)
    chosen = corner_strategy("layer_sets", LAYERS)
    expected = masked_forward(model, inputs, chosen, rankings)
    with torch.no_grad(), dop.pruned(model, chosen, rankings):
        logits = model(**inputs).logits
        generated = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert max_text_difference(model, inputs, logits, expected) < 2e-5
    assert generated.shape[1] == inputs["input_ids"].shape[1] + 3
    assert max_text_difference(model, inputs, model(**inputs).logits, plain) > 1e-3
