"""What the figures show, read back from their artists."""

from __future__ import annotations

import numpy as np
import pytest
from matplotlib.patches import Rectangle
from support.records import example_curves, example_record

from dop_search.app.record import Record
from dop_search.app.report import additive_vs_exact, divergence_curves, layer_map, pareto_front
from dop_search.app.report.kl_plots import rank_correlation
from dop_search.app.report.layer_map import DEAD, RUN, SKIPPED, operation_states
from dop_search.app.report.style import LOOKS, SMALLEST_KL
from dop_search.strategy import Strategy
from dop_search.strategy.operations import MODULES


def random_strategies(count: int) -> list[Strategy]:
    rng = np.random.default_rng(0)
    return [Strategy.from_array(rng.random((2, 9, 3)) < 0.6) for _ in range(count)]


@pytest.mark.parametrize("strategy", [*random_strategies(20), Strategy.full(9), Strategy.depthwise(9, 0, 0, 0)])
def test_run_in_the_map_is_what_the_canonical_strategy_runs(strategy: Strategy) -> None:
    states = operation_states(strategy)
    skipped = {(op.group, op.layer, op.module) for op in strategy.skipped()}
    for (group, layer, module), state in np.ndenumerate(states):
        assert (state != RUN) == ((group, layer, MODULES[module]) in skipped)


@pytest.mark.parametrize("strategy", random_strategies(20))
def test_dead_operations_are_those_whose_running_changes_nothing(strategy: Strategy) -> None:
    """Turning a dead one on leaves the canonical form as it is; turning a skipped one on never does."""
    states = operation_states(strategy)
    for (group, layer, module), state in np.ndenumerate(states):
        if state == RUN:
            continue
        runs = strategy.canonical().to_array()
        runs[group, layer, module] = True
        same = Strategy.from_array(runs).canonical() == strategy.canonical()
        assert same == (state == DEAD)


def test_without_visual_tokens_nothing_runs() -> None:
    assert (operation_states(Strategy.full(4, num_visual_tokens=0)) == SKIPPED).all()


def test_the_map_has_a_cell_per_operation_and_tells_states_apart_without_colour() -> None:
    record = example_record()
    figure = layer_map(record)
    for axis, result in zip(figure.axes[::2], record.results, strict=True):
        cells = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
        states = operation_states(result.strategy)
        assert len(cells) == states.size
        hatches = [cell.get_hatch() or "" for cell in cells]
        assert hatches.count("") == (states == RUN).sum()
        assert len(set(hatches)) == len(np.unique(states))
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["queries", "keys, values", "MLP"]


def test_the_curves_show_measured_means_and_the_interpolation_between() -> None:
    curves = example_curves()
    figure = divergence_curves(curves, 12)
    assert len(figure.axes) == 2
    depth_axis = figure.axes[0]
    mlp = curves.curves["mlp_depth"]
    lines = [np.ma.masked_invalid(np.asarray(line.get_ydata(), dtype=float)) for line in depth_axis.get_lines()]
    assert any(len(y) == len(mlp.levels) and np.allclose(y[:-1], mlp.mean_nats[:-1]) for y in lines)
    dense = mlp(range(13))
    assert any(len(y) == 13 and np.allclose(y[:-1], dense[:-1]) for y in lines)
    labels = [text.get_text() for text in depth_axis.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == ["queries (q)", "keys and values (kv)", "MLP ($D_P$)"]


def test_series_differ_in_marker_and_line_not_only_in_colour() -> None:
    assert len({look.marker for look in LOOKS}) == len({look.line for look in LOOKS}) == len(LOOKS)


def test_the_front_shows_both_fronts_the_results_and_the_floor() -> None:
    record = example_record()
    axis = pareto_front(record).axes[0]
    labels = [text.get_text() for text in axis.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == [
        "all operations, additive estimate",
        "uniform reduction, additive estimate",
        "exact, search set",
        "found, held-out (95 % CI)",
        "uniform, held-out (95 % CI)",
    ]
    found = axis.containers[0].lines[0]  # type: ignore[attr-defined]
    assert np.allclose(found.get_xdata(), [result.flops_ratio for result in record.results])
    assert np.allclose(found.get_ydata(), [result.kl_heldout for result in record.results])
    assert any(text.get_text() == "text alone" for text in axis.texts)


def test_spearman_of_the_scatter() -> None:
    record = example_record()
    candidates = record.all_candidates()
    rho = rank_correlation(candidates)
    assert rho is not None
    additive = np.argsort(np.argsort([item.kl_additive or 0.0 for item in candidates]))
    exact = np.argsort(np.argsort([item.kl_search for item in candidates]))
    n = len(candidates)  # without ties: rho = 1 - 6 sum d^2 / (n (n^2 - 1))
    assert rho[0] == pytest.approx(1 - 6 * float(((additive - exact) ** 2).sum()) / (n * (n**2 - 1)))
    assert rho[1] == n
    texts = [text.get_text() for text in additive_vs_exact(record).axes[0].texts]
    assert texts == [f"Spearman ρ = {rho[0]:.3f}  (n = {n})"]
    assert rank_correlation(candidates[:2]) is None


def _sparse(record: Record) -> Record:
    """Nothing optional, and zeros where a logarithm would break."""
    result = record.results[0].model_copy(
        update={
            "kl_additive": 0.0,
            "kl_search": 0.0,
            "kl_heldout": 0.0,
            "kl_heldout_ci95": None,
            "uniform": None,
            "candidates": [],
            "strategy": Strategy.full(12),
        }
    )
    return record.model_copy(update={"results": [result], "front": [], "uniform_front": [], "floor_ratio": None})


def test_figures_survive_a_bare_record(recwarn: pytest.WarningsRecorder) -> None:
    record = _sparse(example_record())
    for figure in (layer_map(record), pareto_front(record), additive_vs_exact(record)):
        figure.canvas.draw()
    assert not [warning for warning in recwarn if issubclass(warning.category, (UserWarning, RuntimeWarning))]
    assert SMALLEST_KL > 0
