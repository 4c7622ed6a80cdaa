"""Models that somebody has touched: other classes, forwards, hooks, wrappers; what they do counts, or is refused."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from functools import cache
from types import SimpleNamespace

import pytest
import torch
from support.tiny_inputs import tiny_inputs
from support.tiny_models import tiny_model
from torch.nn.modules.module import register_module_forward_hook

import dop_search as dop
from dop_search.pruning import context
from dop_search.pruning.context import is_pruned
from dop_search.testing.measure import model_state, state_difference
from dop_search.utils.errors import DopError, UnsupportedModelError

LAYERS = 4
STRATEGY = dop.Strategy.depthwise(LAYERS, 2, 3, 1, 8, selector="uniform_grid")
model_of = cache(tiny_model)


@pytest.fixture
def model():
    return tiny_model("llava")


@pytest.fixture(scope="module")
def inputs():
    return tiny_inputs(model_of("llava"))


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@cache
def pruned_logits():
    with dop.pruned(model_of("llava"), STRATEGY):
        return logits(model_of("llava"), tiny_inputs(model_of("llava")))


# -- classes and forwards that compute something else ----------------------------------------------------------------


def subclass(module, halves=False):
    """Make the module an instance of its class's child, maybe with a forward of its own."""

    class Mine(type(module)):
        if halves:

            def forward(self, *args, **kwargs):
                output = super().forward(*args, **kwargs)
                return (output[0] * 0.5, *output[1:]) if isinstance(output, tuple) else output * 0.5

    module.__class__ = Mine


@pytest.mark.parametrize(
    ("place", "match"),
    [
        ("layers.3", r"decoder layers of class Mine are not known"),
        ("layers.2.self_attn", r"class Mine in Llama\w+ has"),
    ],
)
def test_a_subclass_with_a_forward_of_its_own_is_refused(place, match, model, inputs):
    module = model.model.language_model.get_submodule(place)
    subclass(module, halves=True)
    with pytest.raises(UnsupportedModelError, match=match):
        dop.prune_(model, STRATEGY)


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
@pytest.mark.parametrize("place", ["layers.3", "layers.2.self_attn", "layers.1.input_layernorm"])
def test_a_subclass_that_adds_nothing_to_the_forward_is_as_good(place, backend, inputs):
    model = tiny_model("llava", attn_implementation=backend)
    subclass(model.model.language_model.get_submodule(place))
    with dop.pruned(model, STRATEGY):
        torch.testing.assert_close(logits(model, inputs), pruned_logits(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("when", ["before", "while"])
@pytest.mark.parametrize("place", ["layers.0", "layers.0.self_attn", "layers.0.input_layernorm"])
def test_a_class_whose_forward_was_replaced_is_refused(place, when, model, inputs, monkeypatch):
    cls = type(model.model.language_model.get_submodule(place))
    with ExitStack() as stack:
        if when == "while":
            stack.enter_context(dop.pruned(model, STRATEGY))
        monkeypatch.setattr(cls, "forward", lambda *args, **kwargs: None)
        with pytest.raises(UnsupportedModelError, match=f"the forward of class {cls.__name__} was replaced"):
            model(**inputs) if when == "while" else dop.prune_(model, STRATEGY)
    monkeypatch.undo()
    with dop.pruned(model, STRATEGY):
        assert torch.equal(logits(model, inputs), pruned_logits())


def test_forwards_and_layers_that_are_replaced_while_pruned(model, inputs):
    layers = model.model.language_model.layers
    with dop.pruned(model, STRATEGY):
        layers[3].forward = layers[3].forward
        with pytest.raises(DopError, match="forward of decoder layer 3 was replaced"):
            model(**inputs)
        del layers[3].forward
        layers[2] = copy.deepcopy(layers[2])
        assert torch.equal(logits(model, inputs), pruned_logits())
        layers[2].register_forward_hook(lambda *_: None)
        with pytest.raises(DopError, match="hook on decoder layer 2"):
            model(**inputs)


def test_what_is_done_to_norms_counts(model, inputs):
    """16 or 7 rows in each layer; a forward of the instance, hooks of all kinds, hooks on all modules."""
    layers, fired = model.model.language_model.layers, []
    norm = layers[0].input_layernorm
    norm.forward = lambda rows: torch.zeros_like(rows)
    with dop.pruned(model, STRATEGY):
        assert not torch.equal(logits(model, inputs), pruned_logits())
    del norm.forward
    norm.register_full_backward_hook(lambda *_: fired.append("backward"))
    norm.register_full_backward_pre_hook(lambda *_: fired.append("backward_pre"))
    with dop.pruned(model, STRATEGY):
        model(**inputs).logits[:, -1].sum().backward()
    assert sorted(fired) == ["backward", "backward_pre"]
    with (
        register_module_forward_hook(lambda module, *_: fired.append(type(module).__name__)),
        dop.pruned(model, STRATEGY),
    ):
        logits(model, inputs)
    assert fired.count("LlamaRMSNorm") == 2 * LAYERS + 1


# -- what compiles the model, and copies -----------------------------------------------------------------------------


def test_a_compiled_model_is_pruned_as_what_it_wraps(model, inputs):
    compiled = torch.compile(model, backend="eager")
    before = model_state(model)
    with dop.pruned(compiled, STRATEGY):
        assert is_pruned(model)
        with pytest.raises(DopError, match="already pruned"):
            dop.prune_(model, STRATEGY)
    assert state_difference(before, model_state(model)) == []
    layers = model.model.language_model.layers
    layers[1] = torch.compile(layers[1], backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"compiled by itself.*compile=True"):
        dop.prune_(model, STRATEGY)


def test_a_step_that_fails_leaves_nothing_pruned(model, monkeypatch):
    before = model_state(model)
    handle = dop.prune_(model, STRATEGY)

    def fail():
        raise RuntimeError("no")

    handle.on_restore(fail)
    with pytest.raises(RuntimeError, match="no"):
        handle.restore()
    assert state_difference(before, model_state(model)) == []
    monkeypatch.setattr(context, "Prefill", lambda *_: fail())
    with pytest.raises(RuntimeError, match="no"):
        dop.prune_(model, STRATEGY)
    assert state_difference(before, model_state(model)) == []


def test_a_shallow_copy_is_refused_too(model):
    with dop.pruned(model, STRATEGY):
        for part in (model, model.model.language_model):
            with pytest.raises(DopError, match="cannot be copied"):
                copy.copy(part)
    assert not is_pruned(copy.copy(model))


# -- other things than a model, a strategy, rankings ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"strategy": "strategy.json"}, r"must be a Strategy, but got 'strategy.json'; .*Strategy\.load"),
        ({"strategy": None}, "must be a Strategy, but got None"),
        ({"rankings": 5}, "`rankings` must have one entry per sample .* but got 5"),
        ({"rankings": []}, r"but got \[\]"),
        ({"rankings": [None]}, r"but got \[None\]"),
        ({"rankings": [[0.5, 0.25]]}, r"but got \[\[0.5, 0.25\]\]"),
        ({"rankings": [[[0, 1]]]}, "`rankings` must have one entry per sample"),
        ({"text": 5}, "`text` must be TextGroups, but got 5"),
        ({"model": 5}, "`model` must be a model, but got int; pass a model of transformers"),
        ({"model": None}, "`model` must be a model, but got NoneType"),
        ({"model": SimpleNamespace(model=torch.nn.Linear(1, 1))}, r"got SimpleNamespace; pass its `\.model`"),
        ({"model": torch.nn.Linear(1, 1)}, "no adapter for Linear"),
    ],
)
def test_anything_else_is_refused_in_a_sentence(arguments, match):
    with pytest.raises(DopError, match=match):
        dop.prune_(**{"model": model_of("llava"), "strategy": STRATEGY, **arguments})
