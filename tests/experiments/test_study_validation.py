"""Studies of the search samples: reweighted curves are measured curves, and rules choose what they say."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support.small_studies import StudyRunner, study_config

from dop_search.app.workbench import Workbench
from dop_search.models.loading import load
from dop_search.search.solution import Solution
from dop_search.strategy import Strategy
from dop_search.utils.errors import ConfigError
from dop_search.utils.intervals import mean_ci95, sign_flip_p
from dop_search.utils.progress import Progress
from experiments.validation_size import study as validation_size
from experiments.validation_size.crossed import crossed
from experiments.validation_size.rules import RULES, adjust, choose, on_samples

SMALL_GRID = ("space.num_depth_levels=2", "space.num_token_levels=2")


def solution(additive: float, samples: list[float]) -> Solution:
    values = np.array(samples)
    strategy = Strategy.depthwise(4, 1, 2, 1)
    return Solution(strategy, {}, 0.3, additive, float(values.mean()), 1, 0.0, "rerank", values)


def test_each_rule_takes_what_it_says() -> None:
    least_estimate = solution(0.1, [0.3, 0.3, 0.3, 1.2])  # certainly worse than the best
    alike = solution(0.2, [0.2, 0.0, 0.0, 0.9])  # worse by 0.05 +- 0.06
    best = solution(0.3, [0.0, 0.1, 0.0, 0.8])
    one_flip = solution(0.4, [0.0, 0.0, 0.0, 1.1])  # the mean is its one flip's
    chosen = choose([best, one_flip, alike, least_estimate])
    assert chosen["additive"] is least_estimate
    assert chosen["rerank"] is best
    assert chosen["one_se"] is alike
    assert chosen["root"] is one_flip


@pytest.mark.slow
def test_a_profile_on_some_samples_is_the_profile_measured_on_them(tmp_path: Path) -> None:
    config = study_config("validation_size", tmp_path, *SMALL_GRID)
    bench = Workbench(config, load("pocket"), Progress())
    part, measured = on_samples(bench.profile(), [0, 1]), bench.profile(num_samples=2)
    for name, curve in measured.curves.curves.items():
        np.testing.assert_allclose(part.curves.curves[name].mean_nats, curve.mean_nats, rtol=2e-3, atol=2e-5)
    strategy = Strategy.depthwise(12, 3, 9, 2, num_visual_tokens=40)
    assert part.store is not None
    assert measured.store is not None
    twice = on_samples(bench.profile(), [1, 1]).store
    assert twice is not None
    np.testing.assert_allclose(
        part.store.evaluate([strategy]), measured.store.evaluate([strategy]), rtol=2e-3, atol=2e-5
    )
    np.testing.assert_array_equal(twice.evaluate([strategy])[0], part.store.evaluate([strategy])[0, [1, 1]])


def test_sizes_seeds_and_families(run_small_study: StudyRunner, tmp_path: Path) -> None:
    given = (*SMALL_GRID, "data.num_samples=4")
    sizes = ("study.options.sizes=[2,4]", "study.options.num_draws=2", "study.options.num_resamples=3")
    result = run_small_study("validation_size", *given, *sizes)
    few, whole = result["rows"]
    assert (few["num_draws"], whole["num_draws"]) == (2, 1)
    for row in (few, whole):
        assert row["kl_search"]["rerank"] == min(row["kl_search"].values())
        assert sum(row["strategies"]["rerank"].values()) == row["num_draws"]
        low, _, high = row["stability"]["kv_depth"]
        assert 0 <= low <= high <= 12
        for rule in RULES[1:]:
            low, high = row["difference_ci95"][rule]
            assert low <= row["kl_heldout"][rule] - row["kl_heldout"]["additive"] <= high
    mean = result["summary"]["0.3"]["difference"]["rerank"]
    rows = [row["kl_heldout"]["rerank"] - row["kl_heldout"]["additive"] for row in (few, whole)]
    assert mean == pytest.approx(np.mean(rows), abs=1e-4)

    folder = tmp_path / "out"
    before = (folder / "result.json").read_text()
    assert (folder / "validation_size.png").exists()
    run_small_study("validation_size", *given, *sizes)
    assert (folder / "result.json").read_text() == before

    other = f"study.folder={tmp_path / 'seed'}"
    seeds = run_small_study("validation_seed", *given, other, "study.options.seeds=[0,1]")["rows"]
    assert [row["seed"] for row in seeds] == [0, 1]
    assert seeds[0]["kl_heldout"] == pytest.approx(whole["kl_heldout"])
    assert seeds[0]["kl_search"] != seeds[1]["kl_search"]

    other, two = f"study.folder={tmp_path / 'source'}", "data.families=[color,read]"
    families = run_small_study("validation_source", *given, other, two, "study.options.num_draws=2")["rows"]
    assert [(row["family"], row["num_samples"]) for row in families] == [("color", 2), ("read", 2)]
    assert (tmp_path / "source" / "validation_source.png").exists()


def test_wrong_options_name_the_remedy(run_small_study: StudyRunner) -> None:
    with pytest.raises(ConfigError, match=r"sizes=\[2, 8\].*set data\.num_samples=8"):
        run_small_study("validation_size", "study.options.sizes=[2,8]")
    with pytest.raises(ConfigError, match=r"two or more different ones, but got \[1, 1\]"):
        run_small_study("validation_seed", "study.options.seeds=[1,1]")
    with pytest.raises(ConfigError, match=r"two or more samples; raise data\.num_samples"):
        run_small_study("validation_source", "data.families=[color]")


def test_an_interval_over_draws_and_samples_widens_with_either() -> None:
    rng = np.random.default_rng(0)
    samples = rng.normal(size=200)
    alone = crossed(samples[None])
    assert alone == (mean_ci95(samples), sign_flip_p(samples))
    both = crossed(samples + rng.normal(size=12)[:, None] * 3.0)
    assert alone.ci95 is not None
    assert both.ci95 is not None
    assert both.ci95[1] - both.ci95[0] > 3.0 * (alone.ci95[1] - alone.ci95[0])
    assert (both.p < 0.05) == (both.ci95[0] > 0.0 or both.ci95[1] < 0.0)
    assert crossed(np.zeros((3, 1))).ci95 is None
    assert crossed(np.full((3, 5), 2.0)) == ((2.0, 2.0), 0.0)


def test_an_interval_over_draws_and_samples_covers_95_percent() -> None:
    """Drawn from the committed differences between rules: six sizes, 192 held-out samples."""
    committed = json.loads((Path(validation_size.__file__).parent / "per_sample.json").read_text())
    by_budget: dict[float, list[np.ndarray]] = {}
    for key, values in committed.items():
        by_budget.setdefault(json.loads(key)["budget"], []).append(np.array(values).reshape(3, -1))
    rng, covered = np.random.default_rng(1), []
    for rules in by_budget.values():
        for population in np.stack(rules, axis=1):
            for num_draws in (4, 6, 12):
                for _ in range(40):
                    rows, columns = rng.integers(0, 6, num_draws), rng.integers(0, 192, 192)
                    interval = crossed(population[np.ix_(rows, columns)]).ci95
                    assert interval is not None
                    covered.append(interval[0] <= population.mean() <= interval[1])
    assert 0.93 <= np.mean(covered) <= 0.97


def test_p_values_are_adjusted_over_all_tables() -> None:
    tables = [{"a": 0.01, "b": 0.04}, {"a": 0.03}]
    adjust(tables)
    assert tables == [{"a": pytest.approx(0.03), "b": pytest.approx(0.06)}, {"a": pytest.approx(0.06)}]
