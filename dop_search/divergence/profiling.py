"""The divergence curves of a model on a validation set, and strategies solved from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from dop_search.data.samples import ValidationSet
from dop_search.divergence import DivergenceEngine, Memory, Teacher, make_teacher
from dop_search.models.loading import LoadedModel
from dop_search.search import CurveGrid, Curves, EvaluationStore, Problem, Solution, Space, Surrogate, rerank_all, solve
from dop_search.selectors import Selector, make_selector
from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget, CostKind, CostModel, LatencyTable
from dop_search.strategy.operations import ModelDims, TokenCounts
from dop_search.utils.errors import ConfigError
from dop_search.utils.versioned import Format, write_json

FORMAT = Format("a profile", "dop_search.profile", 1, "profile the model again")
SAVE_EVERY = 16
"""Strategies per call of the engine: about one curve, so that prefixes are shared and little is lost in a crash."""

OnProgress = Callable[[int, int | None, str], None]


@dataclass(frozen=True)
class Profile:
    """What a search needs to know; solving takes milliseconds and no model.

    One that was just measured can evaluate strategies too, see :class:`MeasuredProfile`.

    Attributes:
        space: what is searched.
        curves: measured divergence of each parameter varied alone.
        dims: sizes of the decoder.
        counts: text and visual tokens of each validation sample.
        facts: where the profile comes from.
        latency: layer times of this device, which latency budgets need; not saved with the profile.
        bytes_per_element: of the KV cache, as the model was loaded; what ``kv_bytes`` budgets count.
    """

    space: Space
    curves: Curves
    dims: ModelDims
    counts: tuple[TokenCounts, ...]
    facts: Mapping[str, Any]
    latency: LatencyTable | None = None
    bytes_per_element: int = 2

    def problem(self, budget: Budget | None = None) -> Problem:
        """The search problem, priced in the budget's kind of cost (FLOPs by default)."""
        return Problem(self.space, self.prices("flops" if budget is None else budget.kind), self._surrogate)

    def prices(self, kind: CostKind = "flops") -> CostModel:
        """What strategies cost on the samples, of one kind."""
        if kind not in self._prices:
            self._prices[kind] = CostModel(self.dims, self.counts, kind, self.bytes_per_element, latency=self.latency)
        return self._prices[kind]

    @cached_property
    def _prices(self) -> dict[CostKind, CostModel]:
        return {}

    @cached_property
    def _surrogate(self) -> Surrogate:
        """One for all budgets: it keeps the front of each kind of cost."""
        return self.curves.surrogate(self.space)

    def solve(self, budget: Budget, solver: str = "additive_exact", **options: Any) -> Strategy:
        """The strategy of a solver under ``budget``; the default is optimal for the additive surrogate. BudgetError if
        nothing fits; names the smallest feasible value."""
        return self._sign(solve(solver, self.problem(budget), budget, **options), budget)

    def _sign(self, solution: Solution, budget: Budget) -> Strategy:
        provenance = {
            **self.facts,
            "solver": solution.solver,
            "budget": {budget.name: budget.value},
            "cost_ratio": solution.cost_ratio,
            "kl_additive_nats": solution.kl_additive,
            "kl_search_nats": solution.kl_search,
        }
        return replace(solution.strategy, provenance=provenance)

    def save(self, folder: str | Path) -> None:
        """Write ``profile.json`` and ``curves.parquet``."""
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        self.curves.save(path / "curves.parquet")
        data = {
            **FORMAT.stamp,
            "space": {
                "name": self.space.name,
                "shares": list(self.space.shares),
                "split": self.space.find("kv", 0) is not None,
                "num_visual_tokens": self.space.tokens.full,
                "min_visual_tokens": self.space.tokens.levels[0],
                "strategy_fields": dict(self.space.strategy_fields),
            },
            "dims": asdict(self.dims),
            "counts": [[item.text, item.visual, *item.several] for item in self.counts],
            "bytes_per_element": self.bytes_per_element,
            "facts": dict(self.facts),
        }
        write_json(path / "profile.json", data)

    @staticmethod
    def load(folder: str | Path) -> Profile:
        """Read what :meth:`save` wrote.

        Raises:
            CacheError: if the folder holds no profile of this version.
        """
        path = Path(folder) / "profile.json"
        data = FORMAT.read(path)
        dims = ModelDims.from_json(data["dims"])
        return Profile(
            space=make_space(num_layers=dims.num_layers, **data["space"]),
            curves=Curves.load(path.parent / "curves.parquet"),
            dims=dims,
            counts=tuple(TokenCounts(text, visual, tuple(several)) for text, visual, *several in data["counts"]),
            facts=data["facts"],
            bytes_per_element=data.get("bytes_per_element", 2),
        )


@dataclass(frozen=True)
class MeasuredProfile(Profile):
    """A profile with the model at hand.

    Attributes:
        store: exact evaluations on the samples, each done once.
    """

    store: EvaluationStore = field(kw_only=True)

    def problem(self, budget: Budget | None = None) -> Problem:
        """The search problem, with exact evaluations."""
        return replace(super().problem(budget), store=self.store)

    def rerank(self, budget: Budget, num_candidates: int = 16, on_progress: OnProgress | None = None) -> Strategy:
        """The best by exact KL of the surrogate's best candidates and uniform reduction."""
        problem = self.problem(budget)
        ranked = rerank_all(problem, budget, num_candidates, on_progress=on_progress)
        return self._sign(ranked[0], budget)


def default_shares(space: str) -> tuple[float, ...]:
    """Share of the kept tokens per group, where nobody says: a quarter and the rest for ``dop_groups`` (GSOP's)."""
    return (0.25, 0.75) if space == "dop_groups" else (1.0,)


def make_space(
    name: str,
    num_layers: int,
    num_visual_tokens: int,
    shares: Sequence[float] = (1.0,),
    split: bool = True,
    min_visual_tokens: int = 1,
    strategy_fields: Mapping[str, Any] | None = None,
) -> Space:
    """A search space by name: ``dop``, ``dop_split``, ``dop_full_kv``, ``dop_groups`` or ``uniform``; ConfigError on an
    unknown name."""
    fields = {"min_visual_tokens": min_visual_tokens, **(strategy_fields or {})}
    makers: dict[str, Callable[..., Space]] = {
        "dop": Space.dop,
        "dop_split": Space.dop_split,
        "dop_full_kv": Space.dop_full_kv,
        "dop_groups": partial(Space.dop_groups, shares=shares, split=split),
        "uniform": Space.uniform,
    }
    if name not in makers:
        raise ConfigError(f"unknown space {name!r}; there are {', '.join(makers)}")
    return makers[name](num_layers, num_visual_tokens, **fields)


def token_counts(teacher: Teacher) -> tuple[TokenCounts, ...]:
    """Text and visual tokens of each sample's prompt: what prefill costs."""
    encoded = [sample.encoded for sample in teacher.samples]
    return tuple(
        TokenCounts.of_prompt(item.visual[: item.prompt_length].cpu().numpy(), item.images) for item in encoded
    )


def evaluation_store(
    loaded: LoadedModel,
    teacher: Teacher,
    *,
    averaging: str = "per_sample",
    cache_dir: Path | None = None,
    storage: str | Path | None = None,
    memory: Memory = "auto",
    keep_states: bool = True,
) -> EvaluationStore:
    """Exact divergences of strategies on a teacher's samples, each computed once and kept under ``cache_dir``; or, with
    ``storage``, shared by all processes that use it and kept there. For ``memory`` see ``DivergenceEngine``."""
    engine = DivergenceEngine(loaded.adapter, teacher, averaging=averaging, memory=memory, keep_states=keep_states)
    name = f"evaluations-{teacher.fingerprint}-{averaging}"
    header = {"teacher": teacher.fingerprint, "averaging": averaging}
    if storage is not None:
        from dop_search.search.shared_store import SharedEvaluationStore  # imports Optuna

        return SharedEvaluationStore(engine, engine.num_samples, storage, name, header)
    path = None if cache_dir is None else cache_dir / f"{name}.jsonl"
    return EvaluationStore(engine, engine.num_samples, path, header, batch_size=SAVE_EVERY)


def profile(
    loaded: LoadedModel,
    data: ValidationSet,
    selector: str | Selector = "cls_attention",
    *,
    space: str = "dop_split",
    shares: Sequence[float] = (1.0,),
    split: bool = True,
    grid: CurveGrid | None = None,
    teacher: Teacher | None = None,
    max_new_tokens: int = 16,
    answers: str = "teacher",
    averaging: str = "per_sample",
    batch_size: int = 16,
    memory: Memory = "auto",
    cache_dir: str | Path | None = None,
    storage: str | Path | None = None,
    on_progress: OnProgress | None = None,
) -> MeasuredProfile:
    """Measure how far the output moves when each parameter of a space varies alone (arXiv 2507.02909).

    Args:
        loaded: the model.
        data: validation samples; 25 to 100 are what the paper uses.
        selector: ranks the visual tokens, by name or with its options.
        space: ``dop`` (the paper's), ``dop_split``, ``dop_groups`` or ``uniform``.
        shares: share of the kept tokens per group of ``dop_groups``.
        split: whether ``dop_groups`` has exit depths of their own for q and kv.
        grid: at which levels the curves are measured.
        teacher: the full model's answers, if they are at hand.
        max_new_tokens, answers, averaging, batch_size, memory: see ``make_teacher`` and ``DivergenceEngine``. The
            numbers do not depend on the last two.
        cache_dir: keeps every evaluation, so that an interrupted profile continues where it stopped.
        storage: keeps the evaluations instead, and lets several processes share them: a journal file, or a database
            URL. Each process asks the full model itself, or reads its answers from ``cache_dir``.
        on_progress: called with (done, total, what).

    Raises:
        DopError: on anything that does not fit together; the message says what to change.
    """
    ranker = make_selector(selector) if isinstance(selector, str) else selector
    if teacher is not None and teacher.selector != ranker:
        raise ConfigError(
            f"`teacher` has its tokens ranked by {teacher.selector!r}, but `selector` is {ranker!r}; make the teacher "
            "with the same selector, or pass that selector"
        )
    cache = None if cache_dir is None else Path(cache_dir)
    if teacher is None:
        notify = (
            None if on_progress is None else lambda done, total: on_progress(done, total, "the full model's answers")
        )
        teacher = make_teacher(
            loaded,
            data,
            ranker,
            max_new_tokens=max_new_tokens,
            answers=answers,
            batch_size=batch_size,
            memory=memory,
            cache_dir=cache,
            on_progress=notify,
        )
    counts = token_counts(teacher)
    dims = loaded.adapter.dims
    num_visual = max(item.visual for item in counts)
    fewest = ranker.fewest_tokens(num_visual, len(loaded.adapter.attention_modules)) if ranker.changes_tower else 1
    searched = make_space(
        space,
        dims.num_layers,
        num_visual,
        shares,
        split,
        min_visual_tokens=fewest,
        strategy_fields={
            "selector": ranker.name,
            "selector_options": ranker.options(),
            "model_fingerprint": loaded.adapter.fingerprint,
        },
    )
    store = evaluation_store(loaded, teacher, averaging=averaging, cache_dir=cache, storage=storage, memory=memory)
    curves = Curves.measure(searched, store, grid, on_progress)
    facts = {
        "model": loaded.name,
        "data": {"name": data.name, "split": data.split, "num_samples": len(data), "fingerprint": data.fingerprint},
        "teacher": teacher.fingerprint,
    }
    element = loaded.model.dtype.itemsize
    return MeasuredProfile(searched, curves, dims, counts, facts, bytes_per_element=element, store=store)
