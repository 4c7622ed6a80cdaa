"""A published method: something that can be fitted to a FLOPs ratio and then applied to a model."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from transformers import PreTrainedModel

from dop_search.baselines.at_prompt import Evaluate, divergence_at_prompt, mean_divergence
from dop_search.baselines.equal_flops import solve_integer
from dop_search.baselines.pricing import Pricing
from dop_search.data.samples import Sample
from dop_search.divergence import DivergenceEngine, Teacher
from dop_search.divergence.profiling import MeasuredProfile, OnProgress, token_counts
from dop_search.models.loading import LoadedModel
from dop_search.pruning import pruned
from dop_search.search import Decide, EvaluationStore
from dop_search.strategy import Strategy
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.utils.errors import DopError

T = TypeVar("T")
ProfileOf = Callable[[str | None, str | None], MeasuredProfile]


@dataclass(frozen=True)
class FitContext:
    """What a method may use to find its hyperparameters.

    Attributes:
        counts: text and visual tokens of each sample that FLOPs are counted on.
        evaluate: scores strategies on validation samples; only methods that measure need it.
        evaluate_at_prompt: as ``evaluate``, but the mean KL(pruned ‖ full) at the last token of the prompt, which some
            methods choose by (:mod:`dop_search.baselines.at_prompt`).
        loaded, teacher: model and validation samples; only methods that look at the model's states need them.
        samples: the teacher's samples with their images; only methods that resize images need them.
        selector, selector_options: ranking before the decoder, for methods that need one and bring none. ``evaluate``
            and ``profile`` must rank by the same.
        profile: the divergence curves of a space and a selector by their names, ``None``: the context's selector; for
            our own searches.
        store: exact divergences of strategies by another selector, for methods that compare selectors.
        decide: divergences of strategies on a separate draw of samples, ``[num_strategies, num_other_samples]``, for
            searches that choose among their last few by it.
        on_progress: called with (done, total, what) by methods that measure for long.
        memo: what methods keep between budgets, such as a search's trajectory.
    """

    dims: ModelDims
    counts: tuple[TokenCounts, ...]
    evaluate: Evaluate | None = None
    evaluate_at_prompt: Evaluate | None = None
    loaded: LoadedModel | None = None
    teacher: Teacher | None = None
    samples: tuple[Sample, ...] | None = None
    selector: str = "cls_attention"
    selector_options: Mapping[str, Any] = field(default_factory=dict)
    profile: ProfileOf | None = None
    store: Callable[[str], EvaluationStore] | None = None
    decide: Decide | None = None
    on_progress: OnProgress | None = None
    memo: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_teacher(
        cls,
        loaded: LoadedModel,
        teacher: Teacher,
        selector: str = "cls_attention",
        selector_options: Mapping[str, Any] | None = None,
        samples: Sequence[Sample] | None = None,
        **fields: Any,
    ) -> FitContext:
        """Everything from a model and its teacher, whose samples were ranked by ``selector``.

        ``samples``: the teacher's, for methods that resize their images. ``fields``: further ones of the class, such as
        an ``evaluate`` that keeps what it has measured.
        """
        if fields.get("evaluate") is None:
            fields["evaluate"] = mean_divergence(DivergenceEngine(loaded.adapter, teacher))
        return cls(
            loaded.adapter.dims,
            token_counts(teacher),
            loaded=loaded,
            teacher=teacher,
            samples=None if samples is None else tuple(samples),
            selector=selector,
            selector_options=dict(selector_options or {}),
            evaluate_at_prompt=divergence_at_prompt(loaded.adapter, teacher),
            **fields,
        )

    @property
    def num_layers(self) -> int:
        return self.dims.num_layers

    @property
    def num_visual(self) -> int:
        """Visual tokens of the largest sample."""
        return max(item.visual for item in self.counts)

    @cached_property
    def pricing(self) -> Pricing:
        """What strategies cost on the samples."""
        if self.loaded is None:
            return Pricing(self.dims, self.counts)
        adapter = self.loaded.adapter
        return Pricing(self.dims, self.counts, adapter.tower_width, adapter.patches_per_token)

    def ranked(self) -> dict[str, Any]:
        """The context's selector as fields of a strategy."""
        return {"selector": self.selector, "selector_options": dict(self.selector_options)}

    def entering(self, kept: int) -> dict[str, Any]:
        """The same with the number of tokens that enter the decoder."""
        return {"num_visual_tokens": None if kept == self.num_visual else kept, **self.ranked()}

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What was made for another budget, or is made now."""
        if key not in self.memo:
            self.memo[key] = make()
        made: T = self.memo[key]
        return made

    def solve(
        self,
        make: Callable[[Any], Strategy],
        low: Any,
        high: Any,
        target: float,
        what: str,
        solver: Callable[..., Any] = solve_integer,
    ) -> tuple[Any, Strategy]:
        """The number in ``[low, high]`` whose strategy costs nearest to ``target``, and that strategy."""
        found = solver(lambda number: self.pricing.ratio(make(number)), low, high, target, what)
        return found, make(found)

    # -- what not every context has; each raises a DopError that says how to make one that does --

    def needs_evaluate(self, method: str) -> Evaluate:
        return _needed(self.evaluate, f"{method} measures divergences")

    def needs_evaluate_at_prompt(self, method: str) -> Evaluate:
        return _needed(self.evaluate_at_prompt, f"{method} measures divergences")

    def needs_profile(self, space: str | None, selector: str | None = None) -> MeasuredProfile:
        """The divergence curves of a space, or the configured one, with the context's selector or another."""
        return _needed(self.profile, f"{space or 'a space'} is searched on measured curves", "profile=…")(
            space, selector
        )

    def needs_store(self, method: str, selector: str) -> EvaluationStore:
        """Exact divergences by another selector."""
        return _needed(self.store, f"{method} measures with every selector", "store=…")(selector)

    def needs_model(self, method: str) -> tuple[LoadedModel, Teacher]:
        why = f"{method} looks at the model's states"
        return _needed(self.loaded, why), _needed(self.teacher, why)

    def needs_samples(self, method: str) -> tuple[LoadedModel, tuple[Sample, ...]]:
        why = f"{method} reads the images"
        return _needed(self.loaded, why), _needed(self.samples, why, "samples=data.samples")


def _needed(value: T | None, why: str, given: str = "") -> T:
    if value is None:
        arguments = ", ".join(("loaded, teacher", *((given,) if given else ())))
        raise DopError(f"{why}: use dop_search.fit(...), or make the context with FitContext.from_teacher({arguments})")
    return value


@dataclass(frozen=True)
class FittedMethod:
    """A method with its hyperparameters.

    Attributes:
        target_ratio: FLOPs ratio that was asked for.
        flops_ratio: FLOPs ratio that it has, text and its own rankings included.
        hyperparameters: what was solved, chosen or measured.
        notes: what a reader of a table should know, such as a deviation from the published setting.
        strategy: what runs, for methods that a strategy expresses.
        runtime: makes the context manager of the others, which ``method`` and ``hyperparameters`` determine.
        processor: from the model's processor to the one that prompts must come from, for methods that resize images.
    """

    method: str
    target_ratio: float
    flops_ratio: float
    hyperparameters: Mapping[str, Any]
    notes: tuple[str, ...] = ()
    strategy: Strategy | None = None
    runtime: Callable[[PreTrainedModel], AbstractContextManager[Any]] | None = field(default=None, compare=False)
    processor: Callable[[Any], Any] | None = field(default=None, compare=False)

    def __post_init__(self) -> None:
        if (self.strategy is None) == (self.runtime is None):
            raise DopError(
                f"a fitted method has either a strategy or a runtime, but {self.method!r} got "
                f"(strategy={self.strategy!r}, runtime={self.runtime!r})"
            )

    def key(self) -> str:
        """A name for what runs: the strategy's, or a hash of the method and its hyperparameters."""
        if self.strategy is not None:
            return self.strategy.key()
        text = json.dumps([self.method, dict(self.hyperparameters)], sort_keys=True)
        return f"{self.method}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"

    def describe(self) -> str:
        """What runs, in a line."""
        return f"{self.method} at {self.flops_ratio:.3f}" if self.strategy is None else self.strategy.describe()

    @property
    def facts(self) -> dict[str, Any]:
        """Everything but what runs, JSON-ready; also the provenance of a saved strategy."""
        return {
            "method": self.method,
            "target_ratio": self.target_ratio,
            "flops_ratio": self.flops_ratio,
            "hyperparameters": dict(self.hyperparameters),
            "notes": list(self.notes),
        }

    def save(self, path: str | Path) -> None:
        """Write the strategy as a file, with the facts as its provenance; DopError if no strategy expresses the method;
        it is fitted again instead."""
        strategy = self.needs_strategy()
        replace(strategy, provenance={**strategy.provenance, **self.facts}).save(path)

    def needs_strategy(self) -> Strategy:
        """``strategy``; DopError if no strategy expresses the method."""
        if self.strategy is None:
            raise DopError(f"no strategy expresses {self.method!r}; run it by `with fitted.apply(model):`")
        return self.strategy

    def reading(self, loaded: LoadedModel) -> LoadedModel:
        """``loaded`` with the processor that prompts for this method must come from: its own for most."""
        return loaded if self.processor is None else replace(loaded, processor=self.processor(loaded.processor))

    @contextmanager
    def apply(self, model: PreTrainedModel) -> Iterator[PreTrainedModel]:
        """Within the context ``model`` runs by the method; on exit, also by an exception, it is what it was."""
        with pruned(model, self.needs_strategy()) if self.runtime is None else self.runtime(model):
            yield model


class Method(ABC):
    """A published method. A new one is one subclass in one file, listed in ``BASELINES``.

    Attributes:
        uses_selector: whether it ranks by the context's selector, so that ``NAME@SELECTOR`` is another method.
    """

    name: ClassVar[str]
    uses_selector: ClassVar[bool] = False

    @abstractmethod
    def fit(self, context: FitContext, flops_ratio: float) -> FittedMethod:
        """Solve the free hyperparameter so that the method costs ``flops_ratio`` of the full model.

        Raises:
            BudgetError: if the method cannot be so cheap; names the smallest feasible ratio.
            DopError: if the context lacks what the method measures with.
        """

    def fitted(
        self,
        context: FitContext,
        target: float,
        strategy: Strategy,
        hyperparameters: Mapping[str, Any],
        notes: Sequence[str] = (),
    ) -> FittedMethod:
        """A result that a strategy expresses, priced, with a note where the target was out of reach by more than 1
        %."""
        ratio = context.pricing.ratio(strategy)
        return FittedMethod(
            method=self.name,
            target_ratio=target,
            flops_ratio=ratio,
            hyperparameters=dict(hyperparameters),
            notes=(*notes, *context.pricing.distance_note(ratio, target)),
            strategy=strategy,
        )
