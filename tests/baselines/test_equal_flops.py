"""Every method at every budget: within one per cent of the target, or a stated infeasibility that is true."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import dop_search.baselines
from dop_search.baselines import BASELINES, FitContext, FittedMethod, Method, baseline
from dop_search.baselines.equal_flops import solve_integer, solve_real
from dop_search.baselines.fitprune import PUBLISHED_SCHEMES, FitPrune, dispensable
from dop_search.baselines.one_stage import FastV
from dop_search.baselines.pricing import TOLERANCE
from dop_search.baselines.pyramiddrop import PyramidDrop
from dop_search.baselines.short_lvlm import ShortLvlm
from dop_search.baselines.shortv import ShortV
from dop_search.baselines.sparsevlm import KEEP_LISTS, SparseVlm
from dop_search.baselines.uniform import UniformReduction
from dop_search.pruning.in_decoder import STAGE_SELECTORS
from dop_search.strategy import Strategy
from dop_search.strategy.cost.flops import full_flops, layer_flops, strategy_flops
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.utils.errors import BudgetError, ConfigError, DopError, NumericalError

BUDGETS = (0.5, 0.3, 0.2, 0.15, 0.1)
SHAPES = {
    "llava_7b": (ModelDims(32, 4096, 11008, 32, 32, 128), 576, 60),
    "pocket_sized": (ModelDims(12, 256, 688, 8, 4, 32), 256, 30),
}


def invented_divergence(num_layers: int):
    weights = np.random.default_rng(0).random((2, num_layers, 3)) * np.linspace(2, 1, num_layers)[None, :, None]

    def evaluate(strategies: Sequence[Strategy]) -> np.ndarray:
        return np.array([(~s.to_array() * weights[: len(s.groups)]).sum() for s in strategies])

    return evaluate


@functools.cache
def context_of(shape: str) -> FitContext:
    dims, visual, text = SHAPES[shape]
    counts = tuple(TokenCounts(text + extra, visual) for extra in range(3))
    evaluate = invented_divergence(dims.num_layers)
    return FitContext(dims, counts, evaluate=evaluate, evaluate_at_prompt=evaluate)


def method_of(name: str, shape: str) -> Method:
    """The registered method, with what it would have measured where there is no model."""
    num_layers, num_visual = SHAPES[shape][0].num_layers, SHAPES[shape][1]
    if name == "fitprune":
        depth = np.arange(1, num_layers + 1)
        return FitPrune(counts=lambda alpha: np.floor(num_visual * (1 - alpha) ** depth).astype(int))
    if name == "short_lvlm":
        return ShortLvlm(order=tuple(reversed(range(num_layers))))
    return BASELINES[name]


def fitted_or_reason(method: Method, context: FitContext, target: float) -> FittedMethod | BudgetError:
    try:
        return method.fit(context, target)
    except BudgetError as error:
        return error


@pytest.mark.parametrize("shape", list(SHAPES))
@pytest.mark.parametrize("name", [name for name in BASELINES if name != "short_lvlm_repair"])
@pytest.mark.fast_cases(8)
def test_every_method_meets_every_budget_or_says_why_not(name: str, shape: str) -> None:
    context = context_of(shape)
    feasible = []
    for target in BUDGETS:
        fitted = fitted_or_reason(method_of(name, shape), context, target)
        if isinstance(fitted, BudgetError):
            assert fitted.smallest_feasible is not None
            assert fitted.smallest_feasible > target * (1 + TOLERANCE)
            assert f"{target:.4f} is asked for" in str(fitted)
            continue
        feasible.append(target)
        if fitted.strategy is not None:
            assert fitted.flops_ratio == pytest.approx(context.pricing.ratio(fitted.strategy), abs=1e-12)
        if abs(fitted.flops_ratio - target) > TOLERANCE * target:
            assert any("nearest achievable" in note for note in fitted.notes)
            # the step of one visual token is coarser than the tolerance
            assert abs(fitted.flops_ratio - target) < 0.5 / context.num_visual
        else:
            assert not any("nearest achievable" in note for note in fitted.notes)
    assert feasible[:2] == [0.5, 0.3], "every method reaches the budgets that papers compare at"
    assert feasible == list(BUDGETS[: len(feasible)]), "what is infeasible stays so at lower budgets"


@pytest.mark.parametrize("name", [*STAGE_SELECTORS])
def test_rankings_are_paid_for(name: str) -> None:
    """The price of a staged method is above that of its operations, by less than its candidates' projections."""
    context = context_of("llava_7b")
    strategy = method_of(name, "llava_7b").fit(context, 0.3).strategy
    operations = context.pricing.cost_model.ratio(strategy)
    overhead = context.pricing.ratio(strategy) - operations
    assert 0 < overhead < 0.05
    if name == "fastv":  # one row of attention: the keys of all rows, and next to nothing else
        dims, (counts, *_) = context.dims, context.counts
        keys = 2 * dims.hidden_size * dims.kv_width * counts.total
        assert overhead == pytest.approx(keys / full_flops(dims, counts), rel=0.02)


def test_smallest_feasible_is_reached() -> None:
    """The ratio that an error names can be asked for, and gives a method that keeps nothing."""
    context = context_of("llava_7b")
    with pytest.raises(BudgetError, match=r"FastV with K=2 cannot go below 0\.1") as caught:
        FastV().fit(context, 0.1)
    fitted = FastV().fit(context, caught.value.smallest_feasible)
    assert fitted.hyperparameters["kept_tokens"] == 0


def test_uniform_reduction_by_hand() -> None:
    """The number of tokens is the nearest one by the closed form written out."""
    dims, visual, text = SHAPES["llava_7b"]
    context = FitContext(dims, (TokenCounts(text, visual),))
    fitted = UniformReduction("random").fit(context, 0.3)

    def ratio(kept: int) -> float:
        layers = 31 * layer_flops(dims, text + kept, text + kept, text + kept)
        return (layers + layer_flops(dims, text, text + kept, text)) / full_flops(dims, context.counts[0])

    best = min(range(visual + 1), key=lambda kept: abs(ratio(kept) - 0.3))
    assert fitted.hyperparameters["num_visual_tokens"] == best
    assert fitted.flops_ratio == pytest.approx(ratio(best), abs=1e-12)


def test_uniform_reduction_where_one_token_is_a_large_step() -> None:
    """A handful of tokens is left: the last one leaves early, at the layer that comes nearest of all."""
    dims, visual, _ = SHAPES["llava_7b"]
    context = FitContext(dims, (TokenCounts(4, visual),))
    method = UniformReduction("random")
    whole = [
        context.pricing.ratio(Strategy.full(dims.num_layers, num_visual_tokens=n, selector="random")) for n in (5, 6)
    ]
    target = 0.6 * whole[0] + 0.4 * whole[1]
    fitted = method.fit(context, target)
    assert (whole[1] - whole[0]) / target > 4 * TOLERANCE
    assert fitted.flops_ratio == pytest.approx(target, rel=TOLERANCE)
    assert fitted.hyperparameters["num_visual_tokens"] == 6
    assert fitted.strategy is not None
    assert fitted.strategy.group_sizes(visual) == (5, 1)
    assert fitted.hyperparameters["last_token_leaves_at"] == pytest.approx(0.4 * dims.num_layers, abs=1)
    assert any("token 6 of 6 leaves at layer" in note for note in fitted.notes)
    ratios = []
    for depth in range(1, dims.num_layers):
        exits = [dims.num_layers, depth]
        strategy = Strategy.depthwise(
            dims.num_layers, exits, exits, exits, num_visual_tokens=6, shares=[5 / 6, 1 / 6], selector="random"
        )
        ratios.append(context.pricing.ratio(strategy))
    assert abs(fitted.flops_ratio - target) == pytest.approx(min(abs(ratio - target) for ratio in ratios))


# -- published schedules --


def average_tokens(strategy: Strategy, num_visual: int) -> float:
    """Visual tokens that are keys, mean over layers: the literature's average number of tokens."""
    sizes = strategy.group_sizes(num_visual)
    return sum(size * len(policy.kv) for size, policy in zip(sizes, strategy.groups, strict=True)) / strategy.num_layers


def test_published_token_averages() -> None:
    """FastV's formula, PyramidDrop's 15/32 and SparseVLM's lists give the averages that their papers name."""
    assert average_tokens(PyramidDrop().strategy(32, 576, 0.5, 8), 576) == 576 * 15 / 32
    released = {"sparsevlm": (64.8, 96.9, 128.6, 192.0), "sparsevlm_v2": (64.4, 96.8, 128.0, 192.4)}
    released["adaptinfer"] = (33.0, 48.75, 65.0, 128.8)
    for version, averages in released.items():
        for (published, keep), average in zip(KEEP_LISTS[version].items(), averages, strict=True):
            method = SparseVlm(version)
            assert method.keep_list(published, 576) == list(keep)
            strategy = method.strategy(32, 576, published)
            assert strategy.stages == ((1, 10, 20) if version == "adaptinfer" else (2, 6, 15))
            assert average_tokens(strategy, 576) == pytest.approx(average, abs=0.05)
    for average in (192, 128, 64):
        for layer in (2, 3):
            kept = round((average * 32 - layer * 576) / (32 - layer))
            assert average_tokens(FastV(layer=layer).strategy(32, 576, kept), 576) == pytest.approx(average, abs=0.5)


def test_interpolated_keep_lists_never_grow_with_depth() -> None:
    for version in KEEP_LISTS:
        for equivalent in np.linspace(36, 576, 200):
            keep = SparseVlm(version).keep_list(equivalent, 576)
            assert keep == sorted(keep, reverse=True)
        assert SparseVlm(version).keep_list(576, 576) == [576, 576, 576]


def test_fitprune_does_without_what_both_sums_can_spare() -> None:
    """By brute force: the longest run of lowest tokens whose rest is at least 1 - alpha of the full sum, in both."""
    rng = np.random.default_rng(1)
    for alpha in (0.0, 0.05, 0.3, 0.9):
        own, cross = rng.random((2, 30)) ** 3
        full = np.array([own.sum() * 1.02, cross.sum()])  # tokens that have left already received the rest
        runs = []
        for mass, total in ((own, full[0]), (cross, full[1])):
            order = sorted(range(30), key=lambda i, mass=mass: mass[i])
            spared = [n for n in range(31) if mass[order[n:]].sum() >= (1 - alpha) * total - 1e-12]
            runs.append(set(order[: max(spared, default=0)]))
        assert set(dispensable(own, cross, full, alpha).tolist()) == runs[0] & runs[1]
    assert len(dispensable(own, cross, full, 1.0)) == 30


def test_fitprune_schemes_save_what_their_names_say() -> None:
    """FLOPs of visual tokens: leaving tokens have a layer's projections and attention, and neither output nor MLP."""
    d, m = 4096, 11008
    saved = {}
    for name, scheme in PUBLISHED_SCHEMES.items():
        flops, strategy = 0.0, FitPrune.published(name)
        sizes = strategy.group_sizes(576)
        for layer in range(32):
            before, after = (
                sum(n for n, policy in zip(sizes, strategy.groups, strict=True) if index in policy.kv)
                for index in (layer, min(layer + 1, 31))
            )
            assert layer == 31 or before - after == scheme[layer]
            flops += 3 * before * d**2 + 2 * before**2 * d + after * d**2 + 3 * m * d * after
        saved[name] = 1 - flops / (32 * (4 * 576 * d**2 + 2 * 576**2 * d + 3 * m * d * 576))
    assert list(saved) == [0, 10, 20, 30, 40, 50, 55, 60, 70, 80, 90]
    for name, ratio in saved.items():  # counts are rounded down, which is much where few tokens leave
        assert ratio == pytest.approx(name / 100, abs=0.05 if name <= 20 else 0.022)
        assert ratio <= name / 100


def test_shortv_as_released_costs_what_others_measured() -> None:
    """SPIDER (2609.34977), table I: 19 frozen layers leave 55 % of LLaVA-1.5-7B's FLOPs and 51 % of LLaVA-NeXT-7B's."""
    dims = SHAPES["llava_7b"][0]
    for model, counts, ratio in (
        ("llava-1.5-7b", TokenCounts(64, 576), 0.55),
        ("llava-v1.6-7b", TokenCounts(64, 2880), 0.51),
    ):
        strategy = ShortV.published(model)
        assert [len(strategy.groups[0].kv), len(strategy.groups[0].q)] == [32, 32 - 19]
        assert strategy_flops(dims, strategy, counts) / full_flops(dims, counts) == pytest.approx(ratio, abs=0.02)
    both = [ShortV.published(f"llava-{version}-13b").groups[0] for version in ("1.5", "v1.6")]
    assert [len(group.q) for group in both] == [40 - 24] * 2
    assert set(both[0].q) ^ set(both[1].q) == {0, 18}, "the lists of the two 13B models differ"


def test_uniform_search_leaves_out_selectors_that_cannot_be_evaluated() -> None:
    """ToMe's halving has a floor that its price does not know; NaN logits are no reason to go on."""

    class Store:
        def __init__(self, selector: str, error: type[DopError]) -> None:
            self.selector, self.error = selector, error

        def evaluate(self, strategies: Sequence[Strategy]) -> np.ndarray:
            if self.selector == "tome":
                raise self.error("at least 8 remain")
            return np.full((len(strategies), 4), 0.1 if self.selector == "scope" else 0.2)

    context = replace(context_of("pocket_sized"), store=lambda selector: Store(selector, DopError))  # type: ignore[arg-type,return-value]
    fitted = baseline("uniform_search").fit(context, 0.3)
    assert fitted.hyperparameters["selector"] == "scope"
    context = replace(context, store=lambda selector: Store(selector, NumericalError))  # type: ignore[arg-type,return-value]
    with pytest.raises(NumericalError):
        baseline("uniform_search").fit(context, 0.3)


# -- solvers and registry --


def test_solvers_equal_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        ratios = np.sort(rng.random(40))
        target = float(rng.uniform(ratios[0], ratios[-1]))
        found = solve_integer(lambda n, ratios=ratios: float(ratios[n]), 0, 39, target, "it")
        assert abs(ratios[found] - target) == pytest.approx(np.abs(ratios - target).min())
        value = solve_real(lambda x, ratios=ratios: float(ratios[round(x)]), 0.0, 39.0, target, "it")
        assert abs(ratios[round(value)] - target) == pytest.approx(np.abs(ratios - target).min())
    with pytest.raises(BudgetError, match=r"it never costs more than 0\.5"):
        solve_integer(lambda n: 0.1 * n, 0, 5, 0.9, "it")


def test_registry_has_every_method_under_its_name() -> None:
    for name, method in BASELINES.items():
        assert method.name == name
        assert baseline(name) is method
    with pytest.raises(ConfigError, match="did you mean 'pyramiddrop'"):
        baseline("pyramidrop")


def test_the_table_of_code_has_every_method_and_the_commits_that_ran() -> None:
    """The README's, against the registry and the facts beside the golden numbers."""
    readme = Path(dop_search.baselines.__file__).with_name("README.md").read_text()
    table = readme.partition("## Beside the authors' code")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines() if line.startswith("| `")]
    assert sorted(name for row in rows for name in re.findall(r"`(\w+)`", row[0])) == sorted(BASELINES)
    cases = Path(__file__).parents[1] / "golden" / "cases"
    sources = [json.loads(path.read_text())["source"] for path in cases.glob("*.json")]
    ran = {(source["repository"], source["commit"][:7]) for source in sources}
    compared = {tuple(row[2].split()) for row in rows if "/" in row[2]}
    assert compared <= ran
    assert len(compared) > 25


@pytest.mark.parametrize("name", ["shortv", "gsop", "fitprune", "short_lvlm"])
def test_methods_that_measure_say_what_they_lack(name: str) -> None:
    dims, visual, text = SHAPES["pocket_sized"]
    with pytest.raises(DopError, match="from_teacher"):
        BASELINES[name].fit(FitContext(dims, (TokenCounts(text, visual),)), 0.5)
