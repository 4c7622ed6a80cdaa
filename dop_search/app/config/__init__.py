"""The configuration: a pydantic tree, and the only place that sees a Hydra ``DictConfig``. Imports no torch."""

from dop_search.app.config.parse import parse_as, parse_config
from dop_search.app.config.schema import (
    DataConfig,
    EvalRunConfig,
    ModelConfig,
    SearchConfig,
    SpaceConfig,
    TrackingConfig,
)

__all__ = [
    "DataConfig",
    "EvalRunConfig",
    "ModelConfig",
    "SearchConfig",
    "SpaceConfig",
    "TrackingConfig",
    "parse_as",
    "parse_config",
]
