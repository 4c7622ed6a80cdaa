"""What can be scored: a strategy, or anything that runs a model otherwise, such as a fitted method."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

from transformers import PreTrainedModel

from dop_search.models.loading import LoadedModel
from dop_search.pruning import pruned
from dop_search.strategy import Strategy


class Runtime(Protocol):
    """``dop_search.baselines.FittedMethod`` is one; with a strategy, it is scored as its strategy is."""

    @property
    def strategy(self) -> Strategy | None:
        """What it runs, if a strategy says it."""

    def key(self) -> str:
        """A name for what it runs: equal ones give equal answers."""

    def describe(self) -> str:
        """What runs, in a line."""

    def apply(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """The context in which the model runs by it."""

    def reading(self, loaded: LoadedModel) -> LoadedModel:
        """The model with the processor that prompts must come from."""


Runnable: TypeAlias = Strategy | Runtime


def strategy_of(method: Runnable | None) -> Runnable | None:
    """The strategy, where one says what runs; ``None`` for the full model, which the empty strategy is too."""
    chosen = method if method is None or isinstance(method, Strategy) else method.strategy or method
    return None if isinstance(chosen, Strategy) and chosen.is_empty else chosen


def running(model: PreTrainedModel, method: Runnable | None) -> AbstractContextManager[Any]:
    """The context in which the model runs by a method; ``None``: as it is, but with every check."""
    if method is None:
        method = Strategy.full(model.config.get_text_config().num_hidden_layers)
    return pruned(model, method) if isinstance(method, Strategy) else method.apply(model)


def reading(loaded: LoadedModel, method: Runnable | None) -> LoadedModel:
    """The model with the processor that a method's prompts must come from: its own for all that resize no images."""
    return loaded if method is None or isinstance(method, Strategy) else method.reading(loaded)
