"""The configuration: a pydantic tree, and the only place that sees a Hydra ``DictConfig``. Imports no torch."""

from dop_search.app.config.parse import parse_as, parse_config
from dop_search.app.config.schema import (
    DataConfig,
    EvalRunConfig,
    ModelConfig,
    SearchConfig,
    SelectorConfig,
    SpaceConfig,
    TrackingConfig,
)
from dop_search.app.config.solvers import (
    AdditiveExactConfig,
    AdditiveOptunaConfig,
    ExactOptunaConfig,
    ExhaustiveConfig,
    SolverConfig,
)

__all__ = [
    "AdditiveExactConfig",
    "AdditiveOptunaConfig",
    "DataConfig",
    "EvalRunConfig",
    "ExactOptunaConfig",
    "ExhaustiveConfig",
    "ModelConfig",
    "SearchConfig",
    "SelectorConfig",
    "SolverConfig",
    "SpaceConfig",
    "TrackingConfig",
    "parse_as",
    "parse_config",
]
