"""Searches of published methods: what GSOP, VTW and ShortV choose, and what GSOP's policies cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from golden_cases import Case, case_names, cases, read_case, tiny_llava

import dop_search as dop
from dop_search.baselines.at_prompt import divergence_at_prompt
from dop_search.baselines.shortv import from_least, frozen_strategy, layer_contributions
from dop_search.baselines.vtw import withdrawal_layer
from dop_search.divergence import Teacher
from dop_search.divergence.encoding import encode
from dop_search.divergence.teacher import TeacherSample
from dop_search.models import adapter_for
from dop_search.search.gsop_search import SHARES, GsopSearch
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import layer_flops, strategy_flops
from dop_search.strategy.operations import MODULES, ModelDims, Module, TokenCounts

THEIRS = [MODULES.index(module) for module in (Module.KV, Module.Q, Module.MLP)]
"""Our places of GSOP's operations 0, 1 and 2."""


def ours(runs: torch.Tensor) -> np.ndarray:
    """``[…, group, layer, operation]`` of GSOP in the order of our modules, canonical."""
    values = runs.numpy().astype(bool)
    values = values[..., np.argsort(THEIRS)]
    flat = values.reshape(-1, *values.shape[-3:])
    return np.stack([Strategy.from_array(item, shares=SHARES).canonical().to_array() for item in flat]).reshape(
        values.shape
    )


def distinct(policies: np.ndarray) -> list[np.ndarray]:
    """Without repeats."""
    result: list[np.ndarray] = []
    for item in policies:
        if not result or not np.array_equal(result[-1], item):
            result.append(item)
    return result


def same(found: Sequence[np.ndarray], expected: Sequence[np.ndarray]) -> bool:
    return len(found) == len(expected) and all(np.array_equal(*pair) for pair in zip(found, expected, strict=True))


def loss_of(case: Case):
    """A cost per cell that does not run, and more for a second one of a layer; dead ones are free."""
    cost, pair = case["in.cost"].numpy()[..., np.argsort(THEIRS)], case["in.pair_cost"].numpy()
    kv = MODULES.index(Module.KV)

    def evaluate(strategies: Sequence[Strategy]) -> np.ndarray:
        result = []
        for strategy in strategies:
            gone = ~strategy.to_array()
            for group in range(2):
                running = np.flatnonzero(~gone[group, :, kv])
                last = running[-1] if len(running) else 0
                dead = np.delete(np.arange(3), kv)
                gone[group, last:, dead] = False
            number = gone.sum(axis=2)
            result.append((gone * cost).sum() + (pair * np.maximum(number - 1, 0)).sum())
        return np.array(result)

    return evaluate


def search_of(case: Case) -> GsopSearch:
    s = case.settings
    return GsopSearch(
        loss_of(case),
        s["layers"],
        free_nats=1e-12,
        stride_nats=s["stride"],
        growth=0.0,
        num_strides=s["greedy_steps"],
        first_prunable=s["remove_key_layer"],
    )


@cases("gsop_search")
def test_gsop_search(case: Case) -> None:
    search = search_of(case)
    points = search.trajectory(lambda strategy: False)
    found = [point.strategy.to_array() for point in points[search.num_free_points - 1 :]]
    assert np.array_equal(found[0], ours(case["out.start_runs"]))
    tried = distinct(ours(case["out.until_first_resort"]))
    tried = tried[1:] if np.array_equal(tried[0], found[0]) else tried
    assert same(found[1 : len(tried) + 1], tried), "up to the first sorting anew"
    expected = [distinct(ours(case[f"out.trajectory{name}_runs"])) for name in ("", "_copy")]
    assert any(same(found, item) for item in expected)
    assert same(found, expected[1]), "as released, were every failed removal undone"


@cases("gsop_search")
def test_gsop_loses_what_the_released_search_loses(case: Case) -> None:
    search = search_of(case)
    points = search.trajectory(lambda strategy: False)[search.num_free_points - 1 :]
    policies, losses = ours(case["out.trajectory_runs"]), case["out.trajectory_loss"].tolist()
    known = {policy.tobytes(): loss for policy, loss in zip(policies, losses, strict=True)}
    shared = [point for point in points if point.strategy.to_array().tobytes() in known]
    assert len(shared) >= 3
    for point in shared:
        assert point.divergence == pytest.approx(known[point.strategy.to_array().tobytes()], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("name", case_names("gsop_flops") + case_names("gsop_trajectory"))
def test_gsop_flops(name: str) -> None:
    """Cell by cell as released, dead operations included, on system, key, rest and text tokens; ours skip those."""
    case = read_case(name)
    s = case.settings
    system, key, rest, text = s["token_nums"]
    dims = ModelDims(s["layers"], s["hidden_size"], s["intermediate_size"], 1, 1, s["hidden_size"])
    counts, shares = TokenCounts(system + text, key + rest), (key / (key + rest), rest / (key + rest))
    runs = case["in.runs"].numpy().astype(bool)[..., np.argsort(THEIRS)]
    flops = []
    for item in runs:
        tokens = system + text + np.einsum("g,glm->ml", [key, rest], item.astype(np.int64))
        flops.append(int(layer_flops(dims, *tokens).sum()))
        assert strategy_flops(dims, Strategy.from_array(item, shares=shares), counts) <= flops[-1]
    if "out.flops" in case.tensors:
        assert flops == case["out.flops"].tolist()
    else:
        full = 32 * layer_flops(dims, *(counts.text + counts.visual,) * 3)
        case.close("out.ratio", torch.tensor(flops) / full)


# -- VTW and ShortV ---------------------------------------------------------------------------------------------------


def teacher_of(case: Case, model) -> Teacher:
    """The case's prompts with one answer token each, whose place is the last of the prompt."""
    adapter, selector, samples = adapter_for(model), make_selector("uniform_grid"), []
    for ids, pixels, logits in zip(case["in.input_ids"], case["in.pixel_values"], case["out.full_logits"], strict=True):
        inputs = {"input_ids": ids[None], "pixel_values": pixels[None]}
        with torch.no_grad():
            last = model(**inputs).logits[0, -1]
        torch.testing.assert_close(last, logits, rtol=1e-3, atol=1e-3)
        answer = int(last.argmax())
        encoded = encode(adapter, inputs, [answer], selector)
        samples.append(TeacherSample(str(len(samples)), encoded, (answer,), last[None].log_softmax(dim=-1)))
    return Teacher(tuple(samples), "golden", selector)


def check_logits(case: Case, model, strategies: Sequence[Strategy]) -> None:
    """The pruned models themselves are the same."""
    for ids, pixels, theirs in zip(
        case["in.input_ids"], case["in.pixel_values"], case["out.pruned_logits"], strict=True
    ):
        for strategy, expected in zip(strategies, theirs, strict=True):
            with torch.no_grad(), dop.pruned(model, strategy):
                found = model(input_ids=ids[None], pixel_values=pixels[None]).logits[0, -1]
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@cases("vtw")
@pytest.mark.fast_cases(1)
def test_vtw(case: Case) -> None:
    model, layers, first = tiny_llava(case), case.settings["layers"], case.settings["first"]
    strategies = [Strategy.depthwise(layers, k, k, k, selector="uniform_grid") for k in range(first, layers)]
    check_logits(case, model, strategies)
    evaluate = divergence_at_prompt(adapter_for(model), teacher_of(case, model))
    case.close("out.mean_kl", torch.from_numpy(evaluate(strategies)))
    assert withdrawal_layer(evaluate, layers, case.settings["eta"], first) == int(case["out.k"])


@cases("shortv")
def test_shortv(case: Case) -> None:
    model, layers = tiny_llava(case), case.settings["layers"]
    check_logits(case, model, [frozen_strategy(layers, {layer}, selector="uniform_grid") for layer in range(layers)])
    evaluate = divergence_at_prompt(adapter_for(model), teacher_of(case, model))
    contributions = layer_contributions(evaluate, layers)
    case.close("out.mean_kl", torch.from_numpy(contributions))
    assert list(from_least(contributions)) == case["out.order"].tolist()
