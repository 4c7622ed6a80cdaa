"""What studies measure with: a model, samples, the full model's answers, profiles, each made once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dop_search.baselines import FitContext, FittedMethod, plain_answers, plain_divergence
from dop_search.config import DataConfig, SearchConfig, SpaceConfig
from dop_search.data.samples import Sample, ValidationSet
from dop_search.data.validation import Split
from dop_search.divergence import Teacher, make_teacher
from dop_search.evaluation import correct_answers
from dop_search.models.loading import LoadedModel
from dop_search.profiling import Profile, evaluation_store, profile
from dop_search.progress import Notify, Progress, watch
from dop_search.search import CurveGrid, EvaluationStore
from dop_search.search_data import load_split
from dop_search.selectors import Selector, make_selector
from dop_search.strategy import Strategy


class Workbench:
    """A model with its samples; asks the full model once per set of samples and selector.

    Args:
        config: model, data, selector, space, budgets: the groups of ``dop-search``.
        loaded: the model.
        progress: shows how far things are.

    Attributes:
        budgets: FLOPs ratios that the study is asked for.
    """

    def __init__(self, config: SearchConfig, loaded: LoadedModel, progress: Progress) -> None:
        self.config, self.loaded, self.progress = config, loaded, progress
        self.budgets = [budget.value for budget in config.budget if budget.name == "flops_ratio"]
        self._data: dict[Any, ValidationSet] = {}
        self._teachers: dict[Any, Teacher] = {}
        self._stores: dict[Any, EvaluationStore] = {}
        self._profiles: dict[Any, Profile] = {}
        self._correct: dict[str, np.ndarray] = {}

    @property
    def cache(self) -> Path:
        """Where everything that was measured is kept, by content."""
        return Path(self.config.cache_dir)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.loaded.adapter.dims.num_layers

    def setup(self) -> dict[str, Any]:
        """What every number depends on."""
        return {
            "model": self.loaded.name,
            "model_fingerprint": self.loaded.adapter.fingerprint,
            "dtype": str(self.loaded.model.dtype).removeprefix("torch."),
            "data": self.config.data.model_dump(mode="json", exclude_defaults=True),
            "samples": dict(self.config.data.sizes),
        }

    # -- data -----------------------------------------------------------------------------------

    def data_config(self, changes: Mapping[str, Any] | None = None) -> DataConfig:
        """The data's configuration with some keys changed."""
        return DataConfig(**{**self.config.data.model_dump(), **(changes or {})})

    def data(self, split: Split, **changes: Any) -> ValidationSet:
        """The samples of a split; ``changes`` are keys of the data's configuration, such as ``num_samples``."""
        key = (split, _frozen(changes))
        if key not in self._data:
            self._data[key] = load_split(self.data_config(changes), split)
        return self._data[key]

    def teacher(self, split: Split, selector: str | Selector | None = None, **changes: Any) -> Teacher:
        """The full model's answers on a split, with its tokens ranked by ``selector`` (default: the configured)."""
        ranker = self.selector(selector)
        key = (split, ranker, _frozen(changes))
        if key not in self._teachers:
            data, config = self.data(split, **changes), self.data_config(changes)
            same = (other for (part, _, what), other in self._teachers.items() if (part, what) == (split, key[2]))
            known = next(same, None)
            with watch(self.progress) as notify:
                self._teachers[key] = make_teacher(
                    self.loaded,
                    data,
                    ranker,
                    max_new_tokens=config.max_new_tokens,
                    answers=config.answers,
                    batch_size=self.config.batch_size,
                    cache_dir=self.cache,
                    answer_ids=None if known is None else [sample.answer_ids for sample in known.samples],
                    on_progress=partial(notify, what=f"full model on {len(data)} {split} samples, {ranker.name}"),
                )
        return self._teachers[key]

    def selector(self, selector: str | Selector | None = None) -> Selector:
        """A selector by name; the configured one has the configured options."""
        if isinstance(selector, Selector):
            return selector
        if selector is None or selector == self.config.selector.name:
            return make_selector(self.config.selector.name, self.config.selector.options)
        return make_selector(selector)

    # -- divergence -----------------------------------------------------------------------------

    def store(self, split: Split, selector: str | Selector | None = None, **changes: Any) -> EvaluationStore:
        """Exact divergences on a split, each measured once."""
        ranker = self.selector(selector)
        key = (split, ranker, _frozen(changes))
        if key not in self._stores:
            self._stores[key] = evaluation_store(
                self.loaded,
                self.teacher(split, ranker, **changes),
                averaging=self.config.data.averaging,
                cache_dir=self.cache,
                hidden_states=self.config.hidden_states if split == "search" else "recompute",
            )
        return self._stores[key]

    def divergence(
        self, strategies: Sequence[Strategy], split: Split = "heldout", what: str = "", **changes: Any
    ) -> np.ndarray:
        """KL in nats ``[num_strategies, num_samples]``, each strategy under its own selector."""
        found: dict[str, np.ndarray] = {}
        by_selector: dict[Selector, list[Strategy]] = {}
        for strategy in strategies:
            by_selector.setdefault(make_selector(strategy.selector, strategy.selector_options), []).append(strategy)
        for selector, its in by_selector.items():
            store = self.store(split, selector, **changes)
            with watch(self.progress) as notify:
                values = store.evaluate(its, on_progress=notify, what=what or f"KL of {len(its)} strategies ({split})")
            found.update((strategy.key(), row) for strategy, row in zip(its, values, strict=True))
        return np.stack([found[strategy.key()] for strategy in strategies])

    def profile(
        self,
        space: str | None = None,
        selector: str | Selector | None = None,
        shares: Sequence[float] | None = None,
        **changes: Any,
    ) -> Profile:
        """The divergence curves of a space on the search samples, with a store for exact evaluations."""
        chosen = self.config.space
        if space is not None:
            chosen = SpaceConfig.model_validate({"name": space, "shares": tuple(shares or _shares(space))})
        ranker = self.selector(selector)
        key = (chosen, ranker, _frozen(changes))
        if key not in self._profiles:
            teacher = self.teacher("search", ranker, **changes)
            grid = self.config.space
            with watch(self.progress, f"{ranker.name}: ") as notify:
                self._profiles[key] = profile(
                    self.loaded,
                    self.data("search", **changes),
                    ranker,
                    space=chosen.name,
                    shares=chosen.shares,
                    grid=CurveGrid.of(grid.num_depth_levels, grid.num_token_levels),
                    teacher=teacher,
                    averaging=self.config.data.averaging,
                    batch_size=self.config.batch_size,
                    hidden_states=self.config.hidden_states,
                    cache_dir=self.cache,
                    on_progress=notify,
                )
        return self._profiles[key]

    def context(self, selector: str | Selector | None = None) -> FitContext:
        """What published methods are fitted with; divergences come from the store of the search samples."""
        ranker = self.selector(selector)
        store = self.store("search", ranker)
        return FitContext.from_teacher(
            self.loaded,
            self.teacher("search", ranker),
            ranker.name,
            {name: getattr(ranker, name) for name in ranker.option_names()},
            evaluate=lambda strategies: store.evaluate(strategies).mean(axis=1),
        )

    # -- methods as they run --------------------------------------------------------------------

    def plain_divergence(self, method: Strategy | FittedMethod, split: Split = "heldout") -> np.ndarray:
        """KL in nats ``[num_samples]`` by plain forwards of the model as it would run; any method."""
        return plain_divergence(self.loaded, self.data(split).samples, self.teacher(split), method)

    def correct(self, method: Strategy | FittedMethod | None = None, split: Split = "test") -> np.ndarray:
        """Which greedy answers are right, boolean ``[num_samples]``; ``None``: the full model's."""
        if method is None:
            method = Strategy.full(self.num_layers)
        strategy = method.strategy if isinstance(method, FittedMethod) else method
        key = None if strategy is None else split + strategy.key()
        if key is None or key not in self._correct:
            right = self._answer(method, self.data(split).samples)
            if key is None:
                return right
            self._correct[key] = right
        return self._correct[key]

    def _answer(self, method: Strategy | FittedMethod, samples: Sequence[Sample]) -> np.ndarray:
        limit = self.config.data.max_new_tokens
        answers = plain_answers(self.loaded, samples, method, batch_size=self.config.batch_size, max_new_tokens=limit)
        return correct_answers(answers, samples)

    @contextmanager
    def watch(self, prefix: str = "") -> Iterator[Notify]:
        """Progress of a study's own loop."""
        with watch(self.progress, prefix) as notify:
            yield notify


def _shares(space: str) -> tuple[float, ...]:
    return (0.25, 0.75) if space == "dop_groups" else (1.0,)


def _frozen(changes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((name, tuple(v) if isinstance(v, list) else v) for name, v in changes.items()))
