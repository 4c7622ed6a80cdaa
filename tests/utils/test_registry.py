"""All registries are alike: near names, and no name is taken twice by accident."""

from __future__ import annotations

from typing import Any

import pytest

from dop_search.app.study import STUDIES, find_study
from dop_search.baselines import BASELINES
from dop_search.evaluation.aggregates import AGGREGATES
from dop_search.evaluation.timing.shapes import SHAPES
from dop_search.models import FAMILIES
from dop_search.pruning.in_decoder import STAGE_SELECTORS
from dop_search.search import SOLVERS
from dop_search.selectors import SELECTORS
from dop_search.utils.errors import ConfigError, DopError, UnsupportedModelError
from dop_search.utils.registry import Registry, did_you_mean, unknown

ALL = {
    "selector": SELECTORS,
    "in-decoder selector": STAGE_SELECTORS,
    "baseline": BASELINES,
    "model type": FAMILIES,
    "solver": SOLVERS,
    "study": STUDIES,
    "aggregate": AGGREGATES,
    "shape": SHAPES,
}


@pytest.mark.parametrize("what", ALL)
def test_a_misspelt_name_gets_a_near_one_and_a_taken_name_is_refused(what: str) -> None:
    find_study("claims")
    registry: Registry[Any] = ALL[what]
    name = next(iter(registry))
    with pytest.raises(DopError, match=rf"unknown {what} '{name}x'; did you mean '{name}'\? there are .*{name}"):
        registry.find(name + "x")
    with pytest.raises(ConfigError, match=f"there is a {what} '{name}' .*give yours another name"):
        registry[name] = object()
    registry[name] = registry[name]


def test_unknown_model_types_are_unsupported_models() -> None:
    with pytest.raises(UnsupportedModelError, match="'llava'"):
        FAMILIES.find("lava")


def test_a_class_that_is_defined_again_takes_the_place_of_the_first() -> None:
    """As where a notebook's cell is run twice."""

    def define() -> type:
        class Mine:
            pass

        return Mine

    registry: Registry[type] = Registry("thing", {})
    registry["mine"] = define()
    second = define()
    registry["mine"] = second
    assert registry.find("mine") is second
    assert dict(registry) == {"mine": second}


def test_near_names() -> None:
    assert did_you_mean("aplha", ["alpha", "beta"]) == "did you mean 'alpha'? "
    assert did_you_mean("alpa", ["alpha", "alpaca", "beta"], count=2) == "did you mean 'alpha' or 'alpaca'? "
    assert did_you_mean("gamma", ["alpha"], cutoff=0.9) == ""
    assert unknown("letter", "gamma", ()) == "unknown letter 'gamma'; there are none"
