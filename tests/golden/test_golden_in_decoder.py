"""Rankings inside the decoder and their schedules: the papers' released code on one layer's input."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden_cases import Case, case_names, cases, decoder_layer, read_case, rope

from dop_search.baselines.fitprune import PUBLISHED_SCHEMES
from dop_search.baselines.hidrop import HiDrop
from dop_search.baselines.pyramiddrop import PyramidDrop
from dop_search.baselines.sparsevlm import SparseVlm
from dop_search.baselines.two_stage import FlowCut, VScan
from dop_search.pruning.attention import signed
from dop_search.pruning.in_decoder import StageSample, make_stage_selector
from dop_search.pruning.in_decoder.base import best_first
from dop_search.pruning.in_decoder.dart import DartSelector
from dop_search.pruning.in_decoder.entropyprune import head_entropy
from dop_search.pruning.in_decoder.fitprune import received_attention
from dop_search.pruning.in_decoder.ivc_prune import IvcPruneSelector
from dop_search.pruning.in_decoder.sparsevlm import cluster_means, num_recycled, with_recycled, word_scores
from dop_search.pruning.stages import StagePlan
from dop_search.strategy import Strategy


def sample_of(case: Case, hidden: torch.Tensor | None = None) -> StageSample:
    """System prompt, image, question; ``hidden`` in the place of what enters the layer."""
    s = case.settings
    length = len(case["in.hidden"])
    cos, sin = rope(length, s["head_dim"], s["rope_theta"])
    first, last = s["system_tokens"], s["system_tokens"] + s["visual_tokens"]
    rows = torch.arange(length)
    return StageSample(
        layer=decoder_layer(case),
        hidden=case["in.hidden"] if hidden is None else hidden,
        cos=cos,
        sin=signed(sin),
        text=torch.cat([rows[:first], rows[last:]]),
        candidates=rows[first:last],
    )


def ranked(name: str, sample: StageSample, num_kept: int, memory: object = None) -> list[int]:
    with torch.no_grad():
        return make_stage_selector(name, {"stages": [1]}).rank(sample, num_kept, memory).order[:num_kept].tolist()


@pytest.mark.parametrize("name", case_names("fastv") + case_names("pyramiddrop"))
def test_last_token(name: str) -> None:
    case = read_case(name)
    sample = sample_of(case)
    with torch.no_grad():
        last = torch.tensor([len(sample.hidden) - 1])
        case.close("out.scores", sample.attention(last).mean(dim=0)[0][sample.candidates])
    kept = ranked(case.facts["method"], sample, case.settings["num_kept"])
    if "out.order" in case.tensors:
        assert kept == case["out.order"].tolist()
        rows = sorted([*sample.text.tolist(), *sample.candidates[kept].tolist()])
        assert rows == case["out.keep_rows"].tolist()
    else:
        assert sorted(kept) == case.kept()


@pytest.mark.parametrize(
    ("name", "selector"),
    [(n, "sparsevlm") for n in case_names("sparsevlm_v1")] + [(n, "sparsevlm_v2") for n in case_names("sparsevlm_v2")],
)
def test_sparsevlm_keeps(name: str, selector: str) -> None:
    case = read_case(name)
    sample = sample_of(case)
    method = make_stage_selector(selector, {"stages": [1]})
    with torch.no_grad():
        weights = method.begin(sample_of(case, case["in.embeds"]))
        raters = weights[case.settings["system_tokens"] :].nonzero()[:, 0]
        case.close("out.scores", method.scores(sample, weights))
    assert raters.tolist() == case["out.raters"].tolist()
    best = case.settings["keep"]
    count = with_recycled(case.settings["visual_tokens"], best) if selector == "sparsevlm" else best
    kept = ranked(selector, sample, count, weights)
    assert kept[:best] == case["out.order"].tolist()
    assert sorted(kept[:best]) == case.kept()
    if selector == "sparsevlm_v2":  # rows and positions as they go on, nothing recycled
        rows = sorted([*sample.text.tolist(), *sample.candidates[kept].tolist()])
        assert rows == case["out.next_positions"].tolist()
        case.close("out.next_hidden", case["in.layer_output"][rows])


@cases("sparsevlm_v1")
def test_sparsevlm_recycles(case: Case) -> None:
    """The released code merges the outputs of the layer; the same tokens, in as many clusters."""
    sample, best, total = sample_of(case), case.settings["keep"], case.settings["visual_tokens"]
    method = make_stage_selector("sparsevlm", {"stages": [1]})
    with torch.no_grad():
        scores = method.scores(sample, method.begin(sample_of(case, case["in.embeds"])))
    order = scores.argsort(descending=True)
    number = num_recycled(total - best)
    assert number == case.settings["recycled_from"]
    clustered = order[best : best + number]
    assert sorted(clustered.tolist()) == case.kept("out.recycled_from")
    assert with_recycled(total, best) - best == case.settings["clusters"]
    _, means = cluster_means(case["in.layer_output"][sample.candidates[clustered]], case.settings["clusters"])
    theirs = case["out.recycled"]
    nearest = torch.cdist(means, theirs).argmin(dim=1)
    assert sorted(nearest.tolist()) == list(range(len(theirs))), "a set of rows"
    case.close("out.recycled", means[nearest.argsort()])


@cases("sparsevlm_schedule")
def test_sparsevlm_schedule(case: Case) -> None:
    s = case.settings
    method = SparseVlm() if s["version"] == 1 else SparseVlm("sparsevlm_v2")
    assert method.keep_list(s["retain"], 576) == case["out.keep_list"].tolist()
    strategy = method.strategy(s["layers"], 576, s["retain"])
    assert strategy.stages == tuple(s["stages"])
    assert tokens_per_layer(strategy, 576) == case["out.tokens"].tolist()


@cases("pyramiddrop_schedule")
def test_pyramiddrop_schedule(case: Case) -> None:
    s = case.settings
    strategy = PyramidDrop().strategy(s["layers"], s["visual_tokens"], 0.5, s["layer_list"][0])
    assert tokens_per_layer(strategy, s["visual_tokens"]) == case["out.tokens"].tolist()


def tokens_per_layer(strategy: Strategy, num_visual: int) -> list[int]:
    sizes = strategy.group_sizes(num_visual)
    return [
        sum(size for size, policy in zip(sizes, strategy.groups, strict=True) if layer in policy.kv)
        for layer in range(strategy.num_layers)
    ]


@cases("vscan_decoder")
def test_vscan_inside_the_decoder(case: Case) -> None:
    """At the released layer the method's criterion keeps the released code's tokens, and as many."""
    s = case.settings
    strategy = VScan().strategy(32, s["visual_tokens"])
    assert list(strategy.stages) == s["layer_list"]
    assert tokens_per_layer(strategy, 576) == [s["visual_tokens"]] * 16 + [s["num_kept"]] * 16
    sample = sample_of(case)
    kept = ranked(strategy.selector, sample, s["num_kept"])
    rows = sorted([*sample.text.tolist(), *sample.candidates[kept].tolist()])
    assert rows == case["out.keep_rows"].tolist()


@cases("vscan_qwen_decoder")
def test_vscan_inside_the_decoder_of_qwen2_5_vl(case: Case) -> None:
    """Without rotation; the released ratios are a sixth of the tokens and .333 of them, which rounds down."""
    s = case.settings
    strategy = VScan().strategy(s["layers"], s["visual_tokens"], has_cls=False)
    assert list(strategy.stages) == s["layer_list"]
    sample = sample_of(case)
    with torch.no_grad():
        ranking = StagePlan(strategy).selector.rank(sample, s["num_kept"], None).order[: s["num_kept"]]
    rows = sorted([*sample.text.tolist(), *sample.candidates[ranking.tolist()].tolist()])
    assert rows == case["out.keep_rows"].tolist()
    assert rows != sorted(
        [*sample.text.tolist(), *sample.candidates[ranked("pyramiddrop", sample, s["num_kept"])].tolist()]
    )


@cases("flowcut_decoder")
def test_flowcut_inside_the_decoder(case: Case) -> None:
    """In layer 1 all tokens are keys, from layer 2 on half of those that entered are there."""
    s = case.settings
    strategy = FlowCut().strategy(32, 2 * s["num_kept"])
    assert tokens_per_layer(strategy, 576) == [2 * s["num_kept"]] * 2 + [s["num_kept"]] * 30
    assert sorted(ranked(strategy.selector, sample_of(case), s["num_kept"])) == case.kept()


@cases("adaptinfer")
def test_adaptinfer(case: Case) -> None:
    first, last = case.settings["system_tokens"], case.settings["system_tokens"] + case.settings["visual_tokens"]
    words = case["in.attention"][:, last:]
    scores = word_scores(words[:, :, last:], words[:, :, first:last])
    case.close("out.scores", scores)
    assert sorted(best_first(scores)[: case.settings["num_kept"]].tolist()) == case.kept()


@cases("entropyprune")
def test_entropyprune(case: Case) -> None:
    first, number = case.settings["system_tokens"], case.settings["visual_tokens"]
    entropy = head_entropy(case["in.queries"].transpose(0, 1)[first : first + number])
    case.close("out.entropy", entropy)
    kept = first + best_first(entropy)[: case.settings["num_kept"]]
    assert kept.tolist() == case["out.order"].tolist()


@cases("dart")
def test_dart(case: Case) -> None:
    """States and keys are given; the order of the pivots is ours or that of the released code's set."""
    s, keys = case.settings, case["in.keys"]
    first, last = s["system_tokens"], s["system_tokens"] + s["visual_tokens"]
    rows, norms = torch.arange(keys.shape[1]), keys.abs().sum(dim=(0, 2))
    selector = DartSelector((2,), s["pivot_image_token"], s["pivot_text_token"])
    kept = selector.order(case["in.states"], norms, rows[first:last], rows[last:], s["num_kept"])[: s["num_kept"]]
    assert kept[: s["pivot_image_token"]].tolist() == (case["out.image_pivots"] - offset(case, first)).tolist()
    assert sorted(kept.tolist()) in (case.kept(), case.kept("out.kept_best_first"))


def offset(case: Case, first: int) -> int:
    """Whether visual pivots are counted from the first row or from the first visual token."""
    return first if int(case["out.image_pivots"].max()) >= case.settings["visual_tokens"] else 0


@cases("fitprune")
def test_fitprune(case: Case) -> None:
    sample = sample_of(case)
    with torch.no_grad():
        own, cross = received_attention(sample)
    case.close("out.self", own)
    case.close("out.cross", cross * float((case["out.cross"] / cross).mean()))
    gone = set(range(case.settings["visual_tokens"])) - set(ranked("fitprune", sample, case.settings["num_kept"]))
    assert sorted(gone) == case.kept("out.deleted")


@cases("fitprune_tables")
def test_fitprune_tables(case: Case) -> None:
    for ratio, scheme in zip(case.settings["reduction_ratios"], case["out.delete_scheme"], strict=True):
        assert list(PUBLISHED_SCHEMES[ratio]) == scheme.tolist()
        assert np.sum(PUBLISHED_SCHEMES[ratio]) < case.settings["visual_tokens"]


@cases("ivc_prune")
def test_ivc_prune(case: Case) -> None:
    """Seeds and value tokens in order, and the published set where as many are kept as in the released code."""
    s, sample = case.settings, sample_of(case)
    first, visual = s["system_tokens"], s["visual_tokens"]
    with torch.no_grad():
        seeds, by_value = IvcPruneSelector((1,)).by_value(sample)
    assert seeds.tolist() == case["out.seeds"].tolist()
    assert by_value[: round(0.2 * visual)].tolist() == case["out.value"].tolist()
    kept = [row - first for row in case["out.keep_rows"].tolist() if first <= row < first + visual]
    assert sorted(ranked("ivc_prune", sample, len(kept))) == kept


@cases("hidrop_topk")
def test_hidrop_keeps(case: Case) -> None:
    """Its differentiable choice is that of the largest scores."""
    assert sorted(best_first(case["in.scores"])[: case.settings["num_kept"]].tolist()) == case.kept()


@pytest.mark.parametrize(("first", "average"), [(87, 48), (215, 64)])
def test_hidrop_schedule(first: int, average: int) -> None:
    """Its settings for LLaVA-1.5-7B are named by the tokens that a layer has on average."""
    method = HiDrop()
    tokens = tokens_per_layer(method.strategy(32, 576, method.counts(576, first)), 576)
    expected = [0] * 8 + [576] * 2 + [first] * 4 + [10] * 2 + [5] * 2 + [1] * 6 + [0] * 8
    assert tokens == expected
    assert round(sum(tokens) / 32) == average
