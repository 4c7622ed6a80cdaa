"""How the divergences of a strategy's samples become the one number by which candidates are ranked.

The divergence is heavy-tailed: most samples hardly move, and a few that flip their answer make up the mean. On some
dozens of samples these few decide which candidate has the least mean KL, and on new samples others flip.
``root_kl``, the mean of the square roots, weighs them less. It bounds what an answer's probabilities change by: the
total variation of two distributions is at most ``sqrt(KL / 2)`` (Pinsker). Over several seeds and sizes of the search
set neither was better than the other (experiments/validation_seed, validation_size): the paper's mean is the default.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from dop_search.utils.errors import ConfigError

Criterion = Literal["kl", "root_kl"]
DEFAULT_CRITERION: Criterion = "kl"

CRITERIA: Mapping[str, Callable[[NDArray[Any]], NDArray[Any]]] = MappingProxyType(
    {
        "kl": lambda per_sample_nats: np.asarray(per_sample_nats.mean(axis=-1)),
        "root_kl": lambda per_sample_nats: np.asarray(np.sqrt(np.maximum(per_sample_nats, 0.0)).mean(axis=-1)),
    }
)
"""From divergences per sample in nats (last axis) to what is minimised; ``kl`` is the paper's mean."""


def score(criterion: str, per_sample_nats: NDArray[Any]) -> NDArray[Any]:
    """The criterion's value of each row of ``[..., num_samples]`` divergences; less is better.

    Raises:
        ConfigError: on an unknown criterion.
    """
    if criterion not in CRITERIA:
        raise ConfigError(f"`criterion` must be one of {', '.join(get_args(Criterion))}, but got {criterion!r}")
    return CRITERIA[criterion](per_sample_nats)
