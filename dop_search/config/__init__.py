"""The configuration: a pydantic tree, and the only place that sees a Hydra ``DictConfig``. Imports no torch."""

from dop_search.config.parse import CONFIG_NAME, config_dir, parse_as, parse_config
from dop_search.config.schema import (
    BudgetConfig,
    DataConfig,
    EvalConfig,
    EvalRunConfig,
    ModelConfig,
    SearchConfig,
    SelectorConfig,
    SpaceConfig,
    TrackingConfig,
)
from dop_search.config.solvers import (
    AdditiveExactConfig,
    AdditiveOptunaConfig,
    ExactOptunaConfig,
    ExhaustiveConfig,
    SolverConfig,
)

__all__ = [
    "CONFIG_NAME",
    "AdditiveExactConfig",
    "AdditiveOptunaConfig",
    "BudgetConfig",
    "DataConfig",
    "EvalConfig",
    "EvalRunConfig",
    "ExactOptunaConfig",
    "ExhaustiveConfig",
    "ModelConfig",
    "SearchConfig",
    "SelectorConfig",
    "SolverConfig",
    "SpaceConfig",
    "TrackingConfig",
    "config_dir",
    "parse_as",
    "parse_config",
]
