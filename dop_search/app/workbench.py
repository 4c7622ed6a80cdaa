"""What searches and studies measure with: a model, samples, the full model's answers, profiles, each made once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dop_search.app.config import DataConfig, SearchConfig, SpaceConfig
from dop_search.baselines import FitContext, FittedMethod, Method, Outcome, parse_method, plain_answers, plain_outcome
from dop_search.data.samples import Sample, ValidationSet
from dop_search.data.validation import SPLITS, Split, validation_set
from dop_search.divergence import Teacher, make_teacher
from dop_search.divergence.profiling import MeasuredProfile, default_shares, evaluation_store, profile
from dop_search.evaluation.accuracy import correct_answers
from dop_search.models.loading import LoadedModel
from dop_search.search import CurveGrid, Decide, EvaluationStore
from dop_search.selectors import Selector, make_selector
from dop_search.strategy import Strategy
from dop_search.utils.errors import ConfigError
from dop_search.utils.progress import Notify, Progress, watch


class Workbench:
    """A model with its samples; asks the full model once per set of samples and selector.

    ``config``: the groups of ``dop-search``; ``timings``: seconds by :meth:`stage`.
    """

    def __init__(self, config: SearchConfig, loaded: LoadedModel, progress: Progress) -> None:
        self.config, self.loaded, self.progress = config, loaded, progress
        self.timings: dict[str, float] = {}
        self._data: dict[Any, ValidationSet] = {}
        self._teachers: dict[Any, Teacher] = {}
        self._stores: dict[Any, EvaluationStore] = {}
        self._profiles: dict[Any, MeasuredProfile] = {}
        self._contexts: dict[Selector, FitContext] = {}
        self._answers: dict[str, list[str]] = {}

    @property
    def cache(self) -> Path:
        """Where everything that was measured is kept, by content."""
        return Path(self.config.cache_dir)

    @property
    def budgets(self) -> list[float]:
        """The budgets, which are FLOPs ratios; see :func:`flops_ratios`."""
        return flops_ratios(self.config)

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
            "samples": {split: self.config.data.sizes[split] for split in SPLITS},
        }

    # -- data -----------------------------------------------------------------------------------

    def data_config(self, changes: Mapping[str, Any] | None = None) -> DataConfig:
        """The data's configuration with some keys changed."""
        return DataConfig(**{**self.config.data.model_dump(), **(changes or {})})

    def data(self, split: Split, **changes: Any) -> ValidationSet:
        """The samples of a split; ``changes`` are keys of the data's configuration, such as ``num_samples``."""
        key = (split, _frozen(changes))
        if key not in self._data:
            config = self.data_config(changes)
            beside = {sample.id for sample in self.data("search", **changes)} if split == "decision" else set()
            drawn = validation_set(
                config.name,
                config.sizes[split] + len(beside),
                config.seed,
                "search" if beside else split,
                path=config.path,
                families=config.families,
                sources=config.sources,
            )
            others = tuple(sample for sample in drawn if sample.id not in beside)
            self._data[key] = replace(drawn, split=split, samples=others[: config.sizes[split]])
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
                    memory=self.config.memory,
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
                storage=self.config.storage,
                memory=self.config.memory,
                keep_states=split == "search",
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

    @property
    def decide(self) -> Decide | None:
        """Divergences on the samples that decide among the last few strategies; ``None`` without such samples."""
        if not self.config.data.num_decision:
            return None
        return partial(self.divergence, split="decision", what="the last few strategies on samples that decide")

    def profile(
        self,
        space: str | None = None,
        selector: str | Selector | None = None,
        shares: Sequence[float] | None = None,
        split: bool = True,
        **changes: Any,
    ) -> MeasuredProfile:
        """The divergence curves of a space on the search samples, with a store for exact evaluations.

        ``shares`` and ``split`` (q and kv apart) are for ``dop_groups``.
        """
        chosen = self.config.space
        if space is not None and (space != chosen.name or shares is not None):
            chosen = SpaceConfig.model_validate({"name": space, "shares": tuple(shares or default_shares(space))})
        ranker = self.selector(selector)
        key = (chosen, split, ranker, _frozen(changes))
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
                    split=split,
                    grid=CurveGrid.of(grid.num_depth_levels, grid.num_token_levels),
                    teacher=teacher,
                    averaging=self.config.data.averaging,
                    batch_size=self.config.batch_size,
                    memory=self.config.memory,
                    cache_dir=self.cache,
                    storage=self.config.storage,
                    on_progress=notify,
                )
        return self._profiles[key]

    @property
    def num_curve_runs(self) -> int:
        """Passes over the search samples for the curves of all profiles."""
        return sum(profile.curves.num_validation_runs for profile in self._profiles.values())

    @property
    def num_search_runs(self) -> int:
        """Passes over the search samples for everything that was evaluated on them."""
        return sum(profile.store.num_validation_runs for profile in self._profiles.values())

    def context(self, selector: str | Selector | None = None) -> FitContext:
        """What published methods are fitted with; divergences come from the store of the search samples."""
        ranker = self.selector(selector)
        if ranker not in self._contexts:
            store = self.store("search", ranker)
            self._contexts[ranker] = FitContext.from_teacher(
                self.loaded,
                self.teacher("search", ranker),
                ranker.name,
                ranker.options(),
                evaluate=lambda strategies: store.evaluate(strategies).mean(axis=1),
                samples=self.data("search").samples,
                profile=lambda space, other: self.profile(space, other or ranker),
                store=lambda other: self.store("search", other),
                decide=self.decide,
            )
        return self._contexts[ranker]

    def fit(self, method: str | Method, flops_ratio: float, selector: str | Selector | None = None) -> FittedMethod:
        """A method by name, also ``NAME@SELECTOR``, or any other, solved on the search samples for a FLOPs ratio.

        ``selector``: for methods that rank by one; default: the one after the ``@``, or else the configured one.

        Raises:
            BudgetError: if the method cannot be so cheap.
            DopError: on an unknown method, or one that this model cannot have.
        """
        chosen, own = parse_method(method) if isinstance(method, str) else (method, None)
        context = self.context(selector or own)
        with self.watch(f"{method if isinstance(method, str) else method.name} at {flops_ratio:g}: ") as notify:
            return chosen.fit(replace(context, on_progress=notify), flops_ratio)

    # -- methods as they run --------------------------------------------------------------------

    def outcome(self, method: Strategy | FittedMethod, split: Split = "heldout") -> Outcome:
        """KL in nats, and whether the answer is the full model's, by forwards of the model as it runs; any method."""
        return plain_outcome(self.loaded, self.data(split).samples, self.teacher(split), method)

    def correct_after(self, method: Strategy | FittedMethod, outcome: Outcome, split: Split = "heldout") -> np.ndarray:
        """Which greedy answers are right, boolean ``[num_samples]``: only those that changed are generated."""
        samples = self.data(split).samples
        right = self.correct(None, split).copy()
        changed = np.flatnonzero(~outcome.same_answer)
        if len(changed):
            asked = [samples[index] for index in changed]
            right[changed] = correct_answers(self._generate(method, asked), asked)
        return right

    def is_annotated(self, split: Split) -> bool:
        """Whether every sample of a split has an answer to compare with."""
        return self.config.data.sizes[split] > 0 and all(sample.answers for sample in self.data(split))

    def correct(
        self, method: Strategy | FittedMethod | None = None, split: Split = "test", notify: Notify | None = None
    ) -> np.ndarray:
        """Which greedy answers are right, boolean ``[num_samples]``; ``None``: the full model's."""
        return correct_answers(self.answers(method, split, notify), self.data(split).samples)

    def answers(
        self, method: Strategy | FittedMethod | None = None, split: Split = "test", notify: Notify | None = None
    ) -> list[str]:
        """Greedy answers, one per sample, each method asked once; ``None``: the full model's."""
        of = "the full model" if method is None else method.describe()
        if isinstance(method, FittedMethod):
            of = method.method
        told = None if notify is None else partial(notify, what=f"answers of {of}")
        method = method or Strategy.full(self.num_layers)
        strategy = method.strategy if isinstance(method, FittedMethod) else method
        if strategy is None:
            return self._generate(method, self.data(split).samples, told)
        key = split + strategy.key()
        if key not in self._answers:
            self._answers[key] = self._generate(method, self.data(split).samples, told)
        return self._answers[key]

    def _generate(
        self,
        method: Strategy | FittedMethod,
        samples: Sequence[Sample],
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        return plain_answers(
            self.loaded,
            samples,
            method,
            batch_size=self.config.batch_size,
            max_new_tokens=self.config.data.max_new_tokens,
            on_progress=on_progress,
            memory=self.config.memory,
        )

    def full_answers(self, split: Split = "test") -> list[str]:
        """The full model's greedy answers, as its teacher has them, one per sample."""
        changes = {} if self.config.data.answers == "teacher" else {"answers": "teacher"}
        answers = [sample.answer_ids for sample in self.teacher(split, **changes).samples]
        texts = self.loaded.processor.batch_decode(answers, skip_special_tokens=True)
        return [text.strip() for text in texts]

    # -- time and progress ----------------------------------------------------------------------

    def watch(self, prefix: str = "") -> AbstractContextManager[Notify]:
        """Progress of a search's or a study's own loop."""
        return watch(self.progress, prefix)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds spent inside to ``timings[name]``."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.timings[name] = self.timings.get(name, 0.0) + time.perf_counter() - start


def _frozen(changes: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((name, tuple(v) if isinstance(v, list) else v) for name, v in changes.items()))


def flops_ratios(config: SearchConfig) -> list[float]:
    """The budgets of a study; ConfigError naming a budget that is none of FLOPs by ratio."""
    for budget in config.budget:
        if budget.name != "flops_ratio":
            raise ConfigError(
                f"studies compare at shares of the full model's FLOPs, but got the budget {budget.plain}; "
                "give ratios, as in budget=[0.3,0.15]"
            )
    return [budget.value for budget in config.budget]
