"""Optuna's pictures of a run's studies, from the journal beside its record."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial
from support.records import example_record

from dop_search.app.report.page import page
from dop_search.app.report.study import PICTURES, STUDIES_FILE, study_figures
from dop_search.search.optuna_study import copy_studies, open_storage


def trial(number: int) -> optuna.trial.FrozenTrial:
    """Costs from 0.05 on; from 0.3 on it is above the budget and was told an estimate of nearly nothing."""
    cost = round(0.05 * (1 + number), 2)
    fits = cost <= 0.3
    selector = ("divprune", "vispruner")[number % 2]
    return create_trial(
        value=0.5 / (1 + number) if fits else 1e-4,
        params={"selector": selector, "num_visual_tokens": 10 * (1 + number), "q_depth_ratio": 1 / (1 + number)},
        distributions={
            "selector": CategoricalDistribution(["divprune", "vispruner"]),
            "num_visual_tokens": IntDistribution(1, 256, log=True),
            "q_depth_ratio": FloatDistribution(0, 1),
        },
        user_attrs={"candidate": {"cost_ratio": cost, "fits": fits}},
    )


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    where = str(tmp_path / "cache.journal")
    storage = open_storage(where)
    for name in ("mine-0.5", "somebody's"):
        study = optuna.create_study(storage=storage, study_name=name)
        study.add_trials([trial(number) for number in range(8)])
        study.add_trial(create_trial(state=TrialState.PRUNED, user_attrs={"candidate": {"cost_ratio": 0.1, "fits": 1}}))
    copy_studies([(where, "mine-0.5")], tmp_path / STUDIES_FILE)
    copy_studies([(where, "mine-0.5")], tmp_path / STUDIES_FILE)  # of a run that is repeated
    return tmp_path


def test_each_study_has_its_pictures_and_the_front_has_what_does_not_fit(run_dir: Path) -> None:
    assert optuna.get_all_study_names(open_storage(run_dir / STUDIES_FILE)) == ["mine-0.5"]
    first, *others = example_record().results
    record = example_record().model_copy(update={"results": [first.model_copy(update={"study": "mine-0.5"}), *others]})
    drawn = study_figures(record, run_dir)
    assert set(drawn) == {f"study_{kind}-{first.budget.text}" for kind in PICTURES}
    points = [len(part.get_offsets()) for part in drawn[f"study_front-{first.budget.text}"].axes[0].collections]
    assert sorted(points) == [1, 2, 5]  # the best, above the budget, the others that fit
    text = page(record, drawn)
    assert text.count("<img ") == len(PICTURES)
    assert text.count(f"{len(first.candidates)} measured strategies at {first.budget.text}") == len(PICTURES)
    assert study_figures(example_record(), run_dir) == {}, "a result without a study has none"
    assert study_figures(record, run_dir / "elsewhere") == {}
