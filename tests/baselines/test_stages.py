"""Selection inside the decoder against plain transformers models with hooks, and slow transcriptions of the
criteria."""

from __future__ import annotations

import functools
from dataclasses import replace

import in_decoder_oracle as oracle
import numpy as np
import pytest
import torch
from support.tiny_inputs import tiny_sample
from support.tiny_models import tiny_llava
from transformers import PreTrainedModel

import dop_search as dop
from dop_search.divergence import DivergenceEngine, Teacher
from dop_search.evaluation.timing.counting import count_decoder_flops
from dop_search.models import adapter_for
from dop_search.pruning.in_decoder import STAGE_SELECTORS
from dop_search.pruning.in_decoder.base import StageRanking
from dop_search.pruning.in_decoder.last_token import FastVSelector
from dop_search.pruning.in_decoder.sparsevlm import density_peaks, split_kept, with_recycled
from dop_search.pruning.stages import StagePlan
from dop_search.selectors import SelectorInputs, make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import strategy_flops
from dop_search.strategy.operations import TokenCounts
from dop_search.testing.inputs import Inputs, collate
from dop_search.testing.measure import cache_lengths
from dop_search.testing.reference import append_tokens, masked_forward, text_positions, visual_positions
from dop_search.utils.errors import DopError, StrategyError

LAYERS = 5
TOLERANCE = 2e-5


def staged(
    selector: str,
    stages: tuple[int, ...],
    exits: list[int],
    shares: list[float],
    entering: int | None = None,
    **options: object,
) -> Strategy:
    return Strategy.depthwise(
        LAYERS, exits, exits, exits, entering, shares, selector=selector, selector_options={"stages": stages, **options}
    )


CASES = {
    "fastv": (staged("fastv", (1,), [LAYERS, 2], [0.25, 0.75]), oracle.fastv),
    "flowcut_two_stage": (staged("flowcut_two_stage", (1,), [LAYERS, 2], [0.5, 0.5]), oracle.flowcut),
    "adaptinfer": (staged("adaptinfer", (1, 3), [LAYERS, 3, 1], [0.25, 0.25, 0.5]), oracle.adaptinfer),
    "entropyprune": (staged("entropyprune", (1,), [LAYERS, 2], [0.25, 0.75]), oracle.entropyprune),
    "pyramiddrop": (staged("pyramiddrop", (1, 2, 4), [LAYERS, 4, 2, 1], [0.125, 0.125, 0.25, 0.5]), oracle.fastv),
    "sparsevlm": (staged("sparsevlm", (1, 3), [LAYERS, 3, 1], [0.25, 0.25, 0.5], recycle=False), oracle.sparsevlm),
    "sparsevlm_v2": (
        staged("sparsevlm_v2", (1, 3), [LAYERS, 3, 1], [0.25, 0.25, 0.5], num_heads=2),
        oracle.sparsevlm_v2,
    ),
    "dart": (staged("dart", (2,), [LAYERS, 2], [0.625, 0.375]), oracle.dart),
    "dart_few": (staged("dart", (2,), [LAYERS, 2], [0.125, 0.875]), oracle.dart),
    "fitprune": (staged("fitprune", (1, 2, 3), [LAYERS, 3, 2, 1], [0.25, 0.25, 0.25, 0.25]), oracle.fitprune),
    "ivc_prune": (staged("ivc_prune", (2,), [LAYERS, 3], [0.5, 0.5]), oracle.ivc_prune),
    # the worst four of sixteen, by uniform_grid, do not enter the decoder
    "before": (
        staged("fastv", (1, 3), [LAYERS, 4, 2], [0.25, 0.25, 0.5], 12, before={"selector": "uniform_grid"}),
        oracle.fastv,
    ),
    # separated at layer 1, gone at layer 3: another ranking comes in between and must leave the group alone
    "later": (staged("fastv", (0, 2), [LAYERS, 2, 1], [0.25, 0.25, 0.5]), oracle.fastv),
}
cases = pytest.mark.parametrize("name", list(CASES))


@functools.cache
def model_of(backend: str) -> PreTrainedModel:
    return tiny_llava(num_layers=LAYERS, attn_implementation=backend)


def samples() -> list[Inputs]:
    model = model_of("eager")
    return [tiny_sample(model, 3, 4, seed=1), tiny_sample(model, 5, 9, seed=2), tiny_sample(model, 2, 6, seed=3)]


def distance(inputs: Inputs, logits: torch.Tensor, expected: torch.Tensor) -> float:
    text = text_positions(model_of("eager"), inputs)
    return float((logits - expected)[text].abs().max() / expected[text].abs().max())


@functools.cache
def expected_rankings(name: str) -> tuple[np.ndarray, ...]:
    strategy, criterion = CASES[name]
    with torch.no_grad():
        before = uniform_grid() if name == "before" else None
        return tuple(oracle.staged_ranking(model_of("eager"), x, strategy, criterion, before) for x in samples())


def uniform_grid() -> np.ndarray:
    return make_selector("uniform_grid").rank(SelectorInputs(16, ((4, 4),)))


@cases
@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_equals_the_method_written_out(name: str, backend: str) -> None:
    """A padded batch through the runtime = each sample alone, ranked by loops over a plain model's attention."""
    model, strategy = model_of(backend), CASES[name][0]
    batch = collate(samples())
    with torch.no_grad(), dop.pruned(model, strategy):
        logits = model(**batch).logits
    expected = masked_forward(model_of("eager"), batch, strategy, expected_rankings(name))
    assert distance(batch, logits, expected) < TOLERANCE


@cases
def test_the_reverse_ranking_is_something_else(name: str) -> None:
    """The comparison above can tell the most important tokens from the least important ones."""
    batch, strategy = collate(samples()), CASES[name][0]
    expected = masked_forward(model_of("eager"), batch, strategy, expected_rankings(name))
    reverse = masked_forward(model_of("eager"), batch, strategy, [r[::-1] for r in expected_rankings(name)])
    assert distance(batch, reverse, expected) > 500 * TOLERANCE


@cases
def test_counted_flops_equal_closed_form(name: str) -> None:
    """The strategy's price plus that of its rankings, to the last FLOP."""
    model, strategy = model_of("eager"), CASES[name][0]
    for text_before, text_after in ((3, 4), (1, 5)):
        sample = tiny_sample(model, text_before, text_after)
        counts, dims = TokenCounts(text_before + text_after, 16), adapter_for(model).dims
        with dop.pruned(model, strategy):
            counted = count_decoder_flops(model, sample)
        unseen = 16 * (4 * dims.num_heads**3 // 3) if name == "entropyprune" else 0  # eigenvalues
        assert counted + unseen == strategy_flops(dims, strategy, counts) + StagePlan(strategy).flops(dims, counts)


@cases
def test_decoding_goes_on_from_the_shorter_caches(name: str) -> None:
    """Each layer's cache holds what its layout had; generated tokens are those of the masked model."""
    model, (strategy, _) = model_of("sdpa"), CASES[name]
    inputs = collate(samples())
    with torch.no_grad(), dop.pruned(model, strategy):
        cache = model(**inputs, use_cache=True).past_key_values
        output = model.generate(
            **inputs, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    sizes = strategy.group_sizes(16)
    longest = max(sample["input_ids"].shape[1] for sample in samples()) - 16
    kept = [sum(n for n, policy in zip(sizes, strategy.groups, strict=True) if x in policy.kv) for x in range(LAYERS)]
    assert cache_lengths(cache) == [longest + n for n in kept]
    full = append_tokens(inputs, output.sequences[:, -4:])
    expected = masked_forward(model_of("eager"), full, strategy, expected_rankings(name))[:, -5:-1]
    got = torch.stack(output.logits, dim=1)
    assert float((got - expected).abs().max() / expected.abs().max()) < TOLERANCE


@cases
def test_canonical_form_is_lossless(name: str) -> None:
    """What a leaving token would do for itself after its last ranking and its last key changes no text logit."""
    model, (strategy, _) = model_of("eager"), CASES[name]
    inputs, ranking = samples()[0], expected_rankings(name)[0]
    canonical = strategy.canonical()
    assert canonical != strategy
    assert canonical.canonical() == canonical
    as_given = masked_forward(model, inputs, strategy, [ranking])
    text = text_positions(model, inputs)
    assert torch.equal(masked_forward(model, inputs, canonical, [ranking])[text], as_given[text])


def test_fastv_reads_the_attention_that_transformers_returns() -> None:
    """The tokens kept are those with the largest head-mean probability in layer K - 1, by the library itself."""
    model, inputs = model_of("eager"), samples()[0]
    visual = visual_positions(model, inputs["input_ids"])[0]
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions[1][0]
    kept = weights.mean(dim=0)[-1][visual].topk(4).indices
    assert set(kept.tolist()) == set(expected_rankings("fastv")[0][:4].tolist())


def test_batch_is_deterministic_and_equals_singles() -> None:
    model = model_of("sdpa")
    for name in CASES:
        strategy, batch = CASES[name][0], collate(samples())
        with torch.no_grad(), dop.pruned(model, strategy):
            together, again = model(**batch).logits, model(**batch).logits
            assert torch.equal(together, again)
            for index, sample in enumerate(samples()):
                alone = model(**sample).logits
                part = together[index : index + 1, -alone.shape[1] :]
                assert distance(sample, part, alone) < TOLERANCE


def test_half_precision_runs() -> None:
    """bfloat16 states, float32 scores."""
    model = tiny_llava(num_layers=LAYERS, attn_implementation="sdpa", dtype=torch.bfloat16)
    for strategy, _ in CASES.values():
        with torch.no_grad(), dop.pruned(model, strategy):
            assert torch.isfinite(model(**tiny_sample(model, 3, 4, seed=1)).logits).all()


def test_merged_before_the_decoder_and_ranked_inside() -> None:
    """The same as a model whose projector gives the means of four boxes, of which two go on from layer 2 on."""
    model, inputs = model_of("eager"), samples()[1]
    strategy = staged("fastv", (1,), [LAYERS, 2], [0.5, 0.5], 4, before={"selector": "avg_pool"})
    boxes = {5: [0, 1, 4, 5], 7: [2, 3, 6, 7], 13: [8, 9, 12, 13], 15: [10, 11, 14, 15]}

    def pool(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        pooled = output.clone()
        for middle, members in boxes.items():
            pooled[:, middle] = output[:, members].mean(dim=1)
        return pooled

    entering = np.array([*boxes, *[i for i in range(16) if i not in boxes]])
    handle = model.model.multi_modal_projector.register_forward_hook(pool)
    with torch.no_grad():
        ranking = oracle.staged_ranking(model, inputs, strategy, oracle.fastv, entering)
        expected = masked_forward(model, inputs, strategy, [ranking])
    handle.remove()
    with torch.no_grad(), dop.pruned(model, strategy):
        logits = model(**inputs).logits
    assert distance(inputs, logits, expected) < TOLERANCE
    assert distance(inputs, masked_forward(model, inputs, strategy, [ranking]), expected) > 50 * TOLERANCE


# -- recycling ---------------------------------------------------------------------------------------------------------


def test_recycled_tokens_stand_in_for_their_clusters() -> None:
    """One-stage SparseVLM: the same as a plain model whose hidden rows were replaced by cluster means at layer 1."""
    model, inputs = model_of("eager"), samples()[1]
    kept = with_recycled(16, 4)
    assert kept == 5  # 30 % of 12, and one more, are 4 tokens in one cluster
    strategy = staged("sparsevlm", (1,), [LAYERS, 1], [kept / 16, 1 - kept / 16])
    plain = replace(strategy, selector_options={"stages": (1,), "recycle": False})
    with torch.no_grad():
        ranking = oracle.staged_ranking(model, inputs, plain, oracle.sparsevlm)
        full = oracle.look(model, inputs, Strategy.full(LAYERS), ranking, 1)["hidden"]
    place = visual_positions(model, inputs["input_ids"])[0].nonzero()[:, 0]
    members = ranking[4:8]
    states = full[place[members.tolist()]]
    # with one cluster, density is over the nearest state: itself; all are equally dense, the first is the centre
    centre = 0
    final = np.concatenate([ranking[:4], [members[centre]], [r for r in ranking[4:] if r != members[centre]]])

    def merge(module: torch.nn.Module, args: tuple, kwargs: dict) -> tuple:
        hidden = args[0].clone()
        hidden[0, place[members[centre]]] = states.mean(dim=0)
        return (hidden, *args[1:]), kwargs

    handle = model.model.language_model.layers[1].register_forward_pre_hook(merge, with_kwargs=True)
    expected = masked_forward(model, inputs, strategy, [final])
    handle.remove()
    with torch.no_grad(), dop.pruned(model, strategy):
        logits = model(**inputs).logits
    assert distance(inputs, logits, expected) < TOLERANCE
    assert distance(inputs, masked_forward(model, inputs, strategy, [final]), expected) > 50 * TOLERANCE
    counts, dims = TokenCounts(14, 16), adapter_for(model).dims
    with dop.pruned(model, strategy):
        counted = count_decoder_flops(model, inputs)
    assert counted == strategy_flops(dims, strategy, counts) + StagePlan(strategy).flops(dims, counts)


def test_density_peaks_finds_separate_clusters() -> None:
    generator = torch.Generator().manual_seed(0)
    means = 20.0 * torch.eye(3, 8)
    truth = torch.arange(30) % 3
    states = means[truth] + 0.1 * torch.randn(30, 8, generator=generator)
    centres, members = density_peaks(states, 3)
    assert len(set(truth[centres].tolist())) == 3
    for cluster in range(3):
        assert len(set(truth[members == cluster].tolist())) == 1
    same_centres, same_members = density_peaks(torch.ones(4, 8), 2)  # all equal: still distinct centres
    assert len(set(same_centres.tolist())) == 2
    assert set(same_members.tolist()) == {0, 1}


def test_kept_and_recycled_add_up() -> None:
    for candidates in (16, 300, 576):
        for best in range(candidates + 1):
            kept = with_recycled(candidates, best)
            again, clustered = split_kept(candidates, kept)
            assert with_recycled(candidates, again) <= kept <= candidates
            assert again >= best
            assert again + clustered <= candidates


# -- what is refused ------------------------------------------------------------------------------------------


def test_refuses_what_cannot_be_ranked_in_time() -> None:
    with pytest.raises(StrategyError, match="group 1 differs from group 0 in layer 1"):
        staged("fastv", (2,), [LAYERS, 1], [0.5, 0.5])
    with pytest.raises(StrategyError, match=r"increasing layers.*\[2, 1\]"):
        staged("fastv", (2, 1), [LAYERS, 3], [0.5, 0.5])
    with pytest.raises(StrategyError, match=r"num_visual_tokens=9, without `before`"):
        Strategy.full(LAYERS, num_visual_tokens=9, selector="fastv", selector_options={"stages": [1]})
    with pytest.raises(StrategyError, match="another depth"):
        CASES["fastv"][0].for_num_layers(8)
    model, wrong = model_of("sdpa"), replace(CASES["fastv"][0], selector="fastw")
    with pytest.raises(DopError, match="mean 'fastv'"), dop.pruned(model, wrong):
        pass
    wrong = replace(CASES["fastv"][0], selector_options={"stages": [1], "speed": 1})
    with pytest.raises(DopError, match="no option \\['speed'\\]"), dop.pruned(model, wrong):
        pass
    with pytest.raises(DopError, match="plain_divergence"):
        DivergenceEngine(adapter_for(model), Teacher((), "none", make_selector("cls_attention"))).evaluate(
            [CASES["fastv"][0]]
        )


def test_an_order_that_is_no_order_is_named(monkeypatch) -> None:
    model = model_of("sdpa")
    monkeypatch.setattr(FastVSelector, "rank", lambda *given: StageRanking(np.zeros(3, dtype=np.int64)))
    with (
        pytest.raises(DopError, match=r"'fastv' must rank each of \d+ tokens once.*3 entries, 1 of them different"),
        dop.pruned(model, CASES["fastv"][0]),
        torch.no_grad(),
    ):
        model(**samples()[0])


def test_images_after_the_first_chunk_are_refused() -> None:
    model, inputs = model_of("sdpa"), samples()[0]
    with torch.no_grad(), dop.pruned(model, CASES["fastv"][0]):
        cache = model(input_ids=inputs["input_ids"][:, :2], use_cache=True).past_key_values
        rest = {**inputs, "input_ids": inputs["input_ids"][:, 2:]}
        with pytest.raises(DopError, match="2 tokens of it are already cached"):
            model(**rest, past_key_values=cache)


def test_strategies_with_stages_survive_a_file(tmp_path) -> None:
    for strategy, _ in CASES.values():
        strategy.save(tmp_path / "s.json")
        loaded = Strategy.load(tmp_path / "s.json")
        assert loaded.stages == strategy.stages
        assert loaded.key() == strategy.key()


def test_every_criterion_is_tested() -> None:
    assert {strategy.selector for strategy, _ in CASES.values()} == set(STAGE_SELECTORS)
