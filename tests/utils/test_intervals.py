"""Intervals cover what they claim, on the tails that this project's own measurements have."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from dop_search.utils.intervals import MIN_DOMINANT, holm, mean_ci95, num_dominant, sign_flip_p

COMPARE = Path(__file__).parents[2] / "experiments" / "compare"


def committed_rows() -> list[np.ndarray]:
    samples = json.loads((COMPARE / "per_sample.json").read_text())
    rows = [np.array(values) for values in samples.values()]
    return [row for row in rows if row.std() > 0.0]


def coverage(populations: list[np.ndarray], num_samples: int, num_draws: int) -> float:
    rng = np.random.default_rng(5)
    covered = []
    for population in populations:
        for _ in range(num_draws):
            interval = mean_ci95(rng.choice(population, num_samples), num_resamples=400)
            assert interval is not None
            covered.append(interval[0] <= population.mean() <= interval[1])
    return float(np.mean(covered))


@pytest.mark.slow
def test_intervals_of_committed_rows_cover_95_percent_with_a_thousand_samples() -> None:
    assert 0.93 <= coverage(committed_rows()[::6], 1000, 30) <= 0.97


@pytest.mark.slow
def test_intervals_of_paired_differences_cover_95_percent_with_a_thousand_samples() -> None:
    rows = committed_rows()
    pairs = [first - second for first, second in zip(rows[::6], rows[3::6], strict=False)]
    assert 0.93 <= coverage([pair for pair in pairs if pair.std() > 0.0], 1000, 30) <= 0.97


@pytest.mark.slow
def test_few_samples_are_enough_where_many_carry_the_mean_and_are_flagged_where_not() -> None:
    rows = committed_rows()
    many = [row for row in rows if num_dominant(row) >= MIN_DOMINANT][::5]
    few = [row for row in rows if num_dominant(row) < MIN_DOMINANT]
    assert 0.93 <= coverage(many, 192, 40) <= 0.97
    assert coverage(few, 192, 40) < 0.9  # so it is right to warn


def test_a_normal_sample_gets_the_interval_of_student() -> None:
    values = np.random.default_rng(0).normal(3.0, 2.0, 400)
    low, high = stats.t.interval(0.95, 399, values.mean(), stats.sem(values))
    found = mean_ci95(values)
    assert found is not None
    assert found == pytest.approx((low, high), abs=0.03)


def test_few_or_equal_values() -> None:
    assert mean_ci95([1.0]) is None
    assert mean_ci95([0.5, 0.5, 0.5]) == (0.5, 0.5)
    few = [0.9, 1.4, 1.1, 0.2]
    assert mean_ci95(few) == pytest.approx(stats.t.interval(0.95, 3, np.mean(few), stats.sem(few)))


def test_no_limit_is_outside_of_what_was_seen_however_few_values_are_large() -> None:
    rng = np.random.default_rng(4)
    for num in (30, 200):
        values = np.append(rng.uniform(1e-9, 1e-8, num - 1), 3.0)
        interval = mean_ci95(values)
        assert interval is not None
        assert 0.0 <= interval[0] <= values.mean() <= interval[1] <= 3.0


def test_sign_flips_are_all_flips_where_they_are_few() -> None:
    values = np.array([0.9, -0.2, 0.7, 1.4, 0.1])
    flips = np.array(list(itertools.product((-1, 1), repeat=5)))
    expected = np.mean(np.abs(flips @ values) >= abs(values.sum()) - 1e-12)
    assert sign_flip_p(values) == pytest.approx(expected)
    assert sign_flip_p([*values, 0.0, 0.0]) == pytest.approx(expected)
    assert sign_flip_p([0.0, 0.0]) == 1.0
    assert np.isnan(sign_flip_p([0.3]))


@pytest.mark.parametrize("num", [5, 13, 14, 700])
def test_sign_flips_are_those_of_scipy(num: int) -> None:
    values = np.random.default_rng(num).standard_normal(num) ** 3 + 0.1
    expected = stats.permutation_test(
        (values,),
        lambda x, axis: np.mean(x, axis=axis),
        permutation_type="samples",
        vectorized=True,
        batch=2_000_000 // num,
        rng=np.random.default_rng(0),
    )
    assert sign_flip_p(values) == expected.pvalue


def test_sign_flips_of_symmetric_noise_reject_as_often_as_they_say() -> None:
    rng = np.random.default_rng(1)
    tails = rng.standard_t(2, (300, 60))
    rejected = np.mean([sign_flip_p(row, num_resamples=400) < 0.05 for row in tails])
    assert 0.02 <= rejected <= 0.08


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([]) == []


def test_how_many_samples_carry_a_mean() -> None:
    assert num_dominant([0.0, 0.0]) == 0
    assert num_dominant([9.0, 0.5, 0.5]) == 1
    assert num_dominant(np.ones(100)) == 90
