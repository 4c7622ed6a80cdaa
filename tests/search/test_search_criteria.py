"""How candidates are ranked by their exact divergences per sample."""

from __future__ import annotations

import numpy as np
import pytest
from invented_problems import pocket_problem

from dop_search.search import rerank_all, score
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import ConfigError


def test_values_are_the_mean_and_the_mean_of_roots() -> None:
    rows = np.array([[0.0, 4.0, 0.25, 0.25], [1.0, 1.0, 1.0, 1.0]])
    assert score("kl", rows).tolist() == [1.125, 1.0]
    assert score("root_kl", rows).tolist() == [0.75, 1.0]
    assert float(score("root_kl", np.array([-1e-18]))) == 0.0


def test_few_flipped_samples_decide_less_by_roots() -> None:
    one_flipped = np.array([8.0] + [0.0] * 15)
    all_moved = np.full(16, 0.25)
    assert score("kl", one_flipped) > score("kl", all_moved)
    assert score("root_kl", one_flipped) < score("root_kl", all_moved)


def test_an_unknown_criterion_names_the_known() -> None:
    with pytest.raises(ConfigError, match="kl, root_kl, but got 'median'"):
        score("median", np.zeros(3))


@pytest.mark.parametrize("criterion", ["kl", "root_kl"])
def test_candidates_are_sorted_by_the_criterion(criterion: str) -> None:
    ranked = rerank_all(pocket_problem(), Budget(flops_ratio=0.5), 8, criterion=criterion)  # type: ignore[arg-type]
    values = [float(score(criterion, item.per_sample_nats)) for item in ranked if item.per_sample_nats is not None]
    assert len(values) == len(ranked) > 4
    assert values == sorted(values)
