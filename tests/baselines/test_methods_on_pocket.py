"""Methods on the bundled model: evaluation against the engine, and what they measure against slow transcriptions."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.answers import answer_questions

from dop_search.baselines import FitContext, baseline, plain_answers, plain_divergence, plain_outcome
from dop_search.baselines.fitprune import inputs_of, measured_counts, prune_layer_by_layer, received_sums
from dop_search.baselines.layer_removal import layers_removed
from dop_search.baselines.short_lvlm import bridge, layer_influence, removal_order
from dop_search.baselines.shortv import layer_contributions
from dop_search.baselines.vtw import PUBLISHED_ETA_NATS, withdrawal_layer
from dop_search.divergence import DivergenceEngine, Teacher, make_teacher
from dop_search.selectors import make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.operations import Module
from dop_search.utils.errors import DopError

LAYERS = 12


@pytest.fixture(scope="module")
def few(teacher) -> Teacher:
    """Two samples with different prompts."""
    return Teacher(teacher.samples[:2], "two", teacher.selector)


@pytest.fixture(scope="module")
def context(pocket, few) -> FitContext:
    return FitContext.from_teacher(pocket, few)


def eager_maps(pocket, sample):
    """Attention maps and layer inputs of the full model on a prompt, by transformers' own eager attention."""
    length = sample.prompt_length
    decoder = pocket.model.model.language_model
    previous = decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    try:
        with torch.no_grad():
            output = decoder(
                inputs_embeds=sample.embeds[None, :length],
                position_ids=sample.full_position_ids[..., :length],
                output_attentions=True,
                output_hidden_states=True,
                use_cache=False,
            )
    finally:
        decoder.config._attn_implementation = previous
    return [a[0].double() for a in output.attentions], [h[0].double() for h in output.hidden_states]


def test_plain_divergence_equals_the_engine(pocket, few_samples, teacher) -> None:
    """For strategies that the engine can score: by prefill and cached continuation, in padded batches."""
    strategies = [
        Strategy.full(LAYERS),
        Strategy.depthwise(LAYERS, [6, 3], [8, 5], [4, 2], num_visual_tokens=20, shares=[0.25, 0.75]),
    ]
    scores = DivergenceEngine(pocket.adapter, teacher).evaluate(strategies)
    for strategy, expected in zip(strategies, scores, strict=True):
        found = plain_divergence(pocket, few_samples.samples, teacher, strategy, batch_size=4)
        np.testing.assert_allclose(found, expected, rtol=2e-3, atol=2e-5)
    assert scores[1].max() > 0.01
    with pytest.raises(DopError, match="same order"):
        plain_divergence(pocket, few_samples.samples[::-1], teacher, strategies[0])


def test_a_prompt_that_ends_in_an_image_keeps_its_last_token(pocket, few_samples, monkeypatch) -> None:
    """A caption follows the image; the engine, cached continuation and ``generate`` all read the image's last token."""
    template = "{% for m in messages %}USER: {% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}"
    template += "{% endif %}{% endfor %} <image>{% endfor %}"
    monkeypatch.setattr(pocket.processor, "chat_template", template)
    samples = few_samples.samples[:2]
    teacher = make_teacher(
        pocket, replace(few_samples, samples=samples), make_selector("cls_attention"), max_new_tokens=4, batch_size=2
    )
    assert bool(teacher.samples[0].encoded.visual[teacher.samples[0].encoded.prompt_length - 1])
    strategy = Strategy.depthwise(LAYERS, 6, 8, 4, num_visual_tokens=20)
    expected = DivergenceEngine(pocket.adapter, teacher).evaluate([strategy])[0]
    assert expected.max() > 0.01
    outcome = plain_outcome(pocket, samples, teacher, strategy, batch_size=2)
    np.testing.assert_allclose(outcome.divergence, expected, rtol=2e-3, atol=2e-5)


@pytest.mark.parametrize("name", ["sparsevlm", "short_lvlm_repair"])
def test_evaluation_does_not_depend_on_the_batch(name: str, pocket, few_samples, few, context) -> None:
    """Methods that no engine scores: padded batches equal samples alone, and pruning does something."""
    fitted = baseline(name).fit(context, 0.3)
    alone, batched = (
        plain_divergence(pocket, few_samples.samples[:2], few, fitted, batch_size=batch_size) for batch_size in (1, 2)
    )
    np.testing.assert_allclose(batched, alone, rtol=5e-3, atol=5e-5)
    assert alone.max() > 1e-6  # what rounding leaves of the full model's KL is 1e-8
    assert "forward" not in vars(pocket.model.model.language_model)


def test_answers_are_those_of_the_evaluation(pocket, few_samples, context) -> None:
    fitted = baseline("cls_attention").fit(context, 0.5)
    expected = answer_questions(pocket, few_samples.samples[:3], fitted.strategy, max_new_tokens=3)
    assert plain_answers(pocket, few_samples.samples[:3], fitted, max_new_tokens=3) == expected


def test_shortv_freezes_what_contributes_least(context) -> None:
    """The order is by the KL of freezing one layer alone; keys and values stay."""
    cost = np.random.default_rng(0).random(LAYERS)

    def evaluate(strategies):
        running = [set(strategy.groups[0].q) for strategy in strategies]
        return np.array([sum(cost[layer] for layer in range(LAYERS) if layer not in kept) for kept in running])

    np.testing.assert_allclose(layer_contributions(evaluate, LAYERS), cost)
    fitted = baseline("shortv").fit(replace(context, evaluate_at_prompt=evaluate, memo={}), 0.5)
    frozen = fitted.hyperparameters["frozen_layers"]
    assert frozen == np.argsort(cost)[: len(frozen)].tolist()
    policy = fitted.strategy.groups[0]
    assert set(policy.q) == set(policy.mlp) == set(range(LAYERS)) - set(frozen)
    assert policy.kv == tuple(range(LAYERS))


def test_vtw_chooses_the_first_layer_that_is_good_enough() -> None:
    scores = {5: 0.9, 6: 0.02, 7: 0.2, 8: 0.01, 9: 0.0, 10: 0.0, 11: 0.0}

    def evaluate(strategies):
        return np.array([scores[strategy.groups[0].depth(Module.KV)] for strategy in strategies])

    assert withdrawal_layer(evaluate, LAYERS, PUBLISHED_ETA_NATS["llava-1.5-7b"]) == 9
    assert withdrawal_layer(evaluate, LAYERS, eta_nats=0.02) == 6
    assert withdrawal_layer(evaluate, LAYERS, eta_nats=0.015) == 8
    with pytest.raises(DopError, match="no layer from 5 on"):
        withdrawal_layer(lambda strategies: np.ones(len(strategies)), LAYERS, 0.5)


def test_fitprune_statistics_are_those_of_eager_attention(pocket, teacher) -> None:
    """Of every pair the maximum over heads, then sums over visual and over text rows."""
    sample = teacher.samples[0].encoded
    sums = received_sums(pocket.adapter, sample)
    maps, _ = eager_maps(pocket, sample)
    visual = sample.visual[: sample.prompt_length]
    for layer in range(LAYERS):
        best = maps[layer].max(dim=0).values
        for found, rows in zip(sums[layer], (visual, ~visual), strict=True):
            assert found == pytest.approx(float(best[rows][:, visual].sum()) / int(rows.sum()), rel=1e-3)


def test_fitprune_measures_the_next_layer_without_what_left(pocket, teacher) -> None:
    """Half of the tokens leave after layer 3: the rest of the decoder runs on the others, at their old positions."""
    sample, seen = teacher.samples[0].encoded, {}

    def leave(layer, own, cross):
        seen[layer] = own
        return np.arange(0, len(own), 2) if layer == 3 else np.empty(0, dtype=np.int64)

    assert prune_layer_by_layer(pocket.adapter, sample, leave) == [128 if layer == 3 else 0 for layer in range(LAYERS)]
    _, states = eager_maps(pocket, sample)
    visual = sample.visual[: sample.prompt_length]
    keep = ~visual | (visual & (visual.cumsum(0) % 2 == 0))
    decoder = pocket.model.model.language_model
    layers, implementation = decoder.layers, decoder.config._attn_implementation
    decoder.config._attn_implementation = "eager"
    decoder.layers = layers[4:]
    try:
        with torch.no_grad():
            maps = decoder(
                inputs_embeds=states[4][keep][None].float(),  # layer 3 did not know who leaves
                position_ids=sample.full_position_ids[..., : sample.prompt_length][..., keep],
                attention_mask=torch.ones(1, int(keep.sum())),  # gaps in the positions are no borders of prompts
                output_attentions=True,
                use_cache=False,
            ).attentions
    finally:
        decoder.layers, decoder.config._attn_implementation = layers, implementation
    for layer, weights in enumerate(maps, start=4):
        rows = weights[0].max(dim=0).values[visual[keep]][:, visual[keep]]
        np.testing.assert_allclose(seen[layer], rows.mean(dim=0).numpy(), rtol=1e-3, atol=1e-7)


def test_fitprune_counts_are_over_the_samples(context, few) -> None:
    counts = measured_counts(context)
    kept = [counts(alpha) for alpha in (0.0, 0.1, 0.5, 1.0)]
    assert kept[0].tolist() == [256] * LAYERS
    assert kept[-1].tolist() == [0] * LAYERS
    assert all((more >= fewer).all() for more, fewer in itertools.pairwise(kept))
    assert counts(0.1) is measured_counts(context)(0.1), "measured once"


def test_layer_influence_written_out(pocket, teacher) -> None:
    sample = teacher.samples[0].encoded
    found = layer_influence(pocket.adapter, sample)
    maps, states = eager_maps(pocket, sample)
    for layer in range(LAYERS - 1):  # transformers' last hidden state is after the final norm
        weight = maps[layer].mean(dim=0)[-1]
        change = 1 - torch.cosine_similarity(states[layer], states[layer + 1], dim=1)
        assert float(found[layer]) == pytest.approx(float((weight * change).sum()), rel=2e-3, abs=1e-5)


def test_short_lvlm_removes_the_least_influential_and_repair_helps(pocket, few, context) -> None:
    order = removal_order(context)
    values = sum(layer_influence(pocket.adapter, known.encoded) for known in few.samples)
    assert [float(values[layer]) for layer in order] == sorted(values.tolist())
    fitted = baseline("short_lvlm").fit(context, 0.8)
    removed = fitted.hyperparameters["removed_layers"]
    assert removed == sorted(order[: len(removed)])
    sample = few.samples[0].encoded
    repair = bridge(pocket, [sample], removed, rank=4)
    full = inputs_of([pocket.adapter.final_norm], pocket.adapter, sample, None)[0]
    with fitted.apply(pocket.model):
        assert len(pocket.model.model.language_model.layers) == LAYERS - len(removed)
    with layers_removed(pocket.model, removed):
        short = inputs_of([pocket.adapter.final_norm], pocket.adapter, sample, None)[0]
    text = ~sample.visual
    assert float((repair(short) - full)[text].norm()) < 0.9 * float((short - full)[text].norm())


def test_methods_rank_before_the_decoder_by_the_contexts_selector(context) -> None:
    other = replace(context, selector="random", selector_options={"seed": 3}, memo={})
    for name in ("vtw", "skip_vision"):
        strategy = baseline(name).fit(other, 0.3).strategy
        assert (strategy.selector, strategy.selector_options) == ("random", {"seed": 3})
