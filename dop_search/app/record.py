"""The records of a search and of an evaluation: what reports, notebooks and everything downstream read.

``record.json`` (``dop-search``) and ``scores.json`` (``dop-eval``) lie in the run directory. Nothing here needs torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, PlainValidator, ValidationError

from dop_search.strategy import Strategy
from dop_search.strategy.cost import Budget
from dop_search.utils.errors import CacheError
from dop_search.utils.versioned import Format, write_json

RECORD_FILE = "record.json"
SCORES_FILE = "scores.json"
CURVES_FILE = "curves.parquet"
SAMPLES_FILE = "samples.json"
SAMPLES_FOLDER = "samples"
FULL_FOLDER = "full"

Interval = tuple[float, float]
"""A 95 % confidence interval ``(low, high)``, by bootstrap over samples."""
Ratio = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0.0)]
Point = tuple[float, float]
"""``(FLOPs ratio, additive KL in nats)``."""


def _strategy(value: Any) -> Strategy:
    return value if isinstance(value, Strategy) else Strategy.from_json(value)


BudgetField = Annotated[Budget, PlainValidator(Budget.of), PlainSerializer(lambda budget: budget.plain)]
"""A :class:`Budget`: in the file a number is a FLOPs ratio, anything else ``{"kv_ratio": 0.3}`` and the like."""
StrategyField = Annotated[Strategy, PlainValidator(_strategy), PlainSerializer(lambda strategy: strategy.to_json())]
"""A :class:`Strategy`, as its JSON in the file."""


class Part(BaseModel):
    """Base of every part: unknown fields, NaN and infinite numbers are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, arbitrary_types_allowed=True)


class Named(Part):
    """Something chosen by name, with its options."""

    name: str
    options: dict[str, Any] = {}


class ModelInfo(Part):
    """The model that was searched."""

    name: str
    fingerprint: str
    num_layers: Count
    num_visual_tokens: Annotated[float, Field(ge=0.0)] | None = None
    """Mean over the search set; the same for every sample in models of fixed resolution."""
    num_text_tokens: Annotated[float, Field(ge=0.0)] | None = None
    num_parameters: Count | None = None
    dtype: str | None = None
    device: str | None = None
    attn_implementation: str | None = None


class DataInfo(Part):
    """The samples that were used."""

    name: str
    num_samples: Count
    num_heldout: Count
    num_test: Count = 0
    num_decision: Count = 0
    """Samples that decided among the last few strategies."""
    seed: int = 0
    answers: str = "teacher"
    averaging: str = "per_sample"
    fingerprints: dict[str, str] = {}
    """Of the search, held-out and test set."""
    sources: list[dict[str, Any]] = []
    """Splits of benchmarks and data sets that the samples come from."""
    samples_file: str | None = None
    """File beside the record with the sample ids of every set, see :func:`save_sample_ids`."""


class Measured(Part):
    """What a strategy costs and loses. KLs in nats, ratios to the full model."""

    flops_ratio: Ratio
    kl_additive: float | None = None
    """The surrogate's estimate; ``None`` where there is none."""
    kl_heldout: float
    kl_heldout_ci95: Interval | None = None
    latency_ratio: Ratio | None = None
    """Predicted prefill time relative to the full model on the device of the search; ``None`` if no budget asked."""


class UniformResult(Measured):
    """Uniform token reduction (``n_v`` alone, the same selector) at the FLOPs of the found strategy."""

    num_visual_tokens: Count
    kv_ratio: Ratio | None = None
    kl_search: float | None = None
    accuracy: float | None = None


class ScoreComparison(Part):
    """One benchmark under the full model, a strategy, and uniform reduction at the strategy's FLOPs."""

    full: float
    """In the benchmark's unit, as the other scores."""
    pruned: float
    uniform: float | None = None
    ci95: Interval | None = None
    """Of pruned minus full, by a bootstrap over samples that pairs the two."""
    uniform_ci95: Interval | None = None
    """Of pruned minus uniform; above zero: the found strategy is better."""
    unit: str = "%"
    num_samples: Count = 0

    @property
    def relative_pruned(self) -> float | None:
        """Per cent of the full model's score that the strategy keeps; ``None`` if that is 0."""
        return 100.0 * self.pruned / self.full if self.full else None

    @property
    def relative_uniform(self) -> float | None:
        """The same for uniform reduction."""
        return 100.0 * self.uniform / self.full if self.full and self.uniform is not None else None


class RelativeMean(Part):
    """Mean over benchmarks of the per cent of the full model's score: the literature's relative average."""

    pruned: float | None
    """``None`` if the full model scores 0 on a benchmark."""
    uniform: float | None = None


class SuiteInfo(Part):
    """The benchmarks that were run."""

    suite: str
    limit: Count | None = None
    """Most samples per benchmark."""
    batch_size: Count | None = None
    fingerprint: str | None = None
    """Of the full model's scores."""


class Candidate(Part):
    """A strategy whose exact KL was measured on the search set."""

    describe: str
    flops_ratio: Ratio
    kl_search: float
    kl_additive: float | None = None
    kl_decision: float | None = None
    """On the samples that decided among the last few; ``None`` for the others."""
    selector: str | None = None
    is_uniform: bool = False


class Result(Measured):
    """What one budget led to. All KLs in nats; accuracies and ratios in 0..1."""

    budget: BudgetField
    strategy: StrategyField
    kv_ratio: Ratio
    kl_search: float
    kl_search_ci95: Interval | None = None
    num_dominant: Count | None = None
    """Held-out samples that carry 90 % of the mean KL; ``None`` in records that do not say."""
    accuracy_full: float | None = None
    """``None``: not evaluated (``eval=none``)."""
    accuracy_pruned: float | None = None
    uniform: UniformResult | None
    """``None`` if not even one visual token fits with every operation on."""
    num_validation_runs: Count
    """Passes over the search set with a pruned model that this result needed, the curves included."""
    seconds: Seconds
    kl_heldout_difference_ci95: Interval | None = None
    """Of pruned minus uniform, paired by sample; below zero: the found strategy is better."""
    kl_heldout_difference_p: Annotated[float, Field(ge=0.0, le=1.0)] | None = None
    """That pruned and uniform lose the same, paired by sample: by sign flips, by Holm over the record's budgets."""
    candidates: list[Candidate] = []
    study: str | None = None
    """Name of the Optuna study that it comes from, in ``studies.journal`` beside the record."""
    latency_ms: Annotated[float, Field(ge=0.0)] | None = None
    """Predicted prefill milliseconds, mean over the search set."""
    scores: dict[str, ScoreComparison] = {}
    """Benchmark → scores, where a suite ran (``eval=pocket13``, ``eval=dop13``, …)."""
    relative_mean: RelativeMean | None = None

    @property
    def uniform_strategy(self) -> Strategy | None:
        """The uniform reduction that this result is compared with."""
        if self.uniform is None:
            return None
        found = self.strategy
        return Strategy.full(
            found.num_layers,
            num_visual_tokens=self.uniform.num_visual_tokens,
            selector=found.selector,
            selector_options=found.selector_options,
            model_fingerprint=found.model_fingerprint,
        )


class Provenance(Part):
    """Where the numbers come from."""

    started_at: str
    """ISO 8601, UTC."""
    versions: dict[str, str] = {}
    git_commit: str | None = None
    command: str | None = None
    machine: str | None = None
    config: dict[str, Any] = {}
    search_id: str | None = None
    """Also in the provenance of the strategies and on the tracked runs, so that later runs find the search."""


class Saved(Part):
    """A record that is a file."""

    KIND: ClassVar[Format]
    FILE: ClassVar[str]
    version: Literal[1] = 1

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, atomically."""
        write_json(path, self.model_dump(mode="json"), allow_nan=False)

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a record, from its file or its run directory; CacheError if there is none, or it is malformed."""
        file = Path(path) / cls.FILE if Path(path).is_dir() else Path(path)
        data = cls.KIND.read(file)
        try:
            return cls.model_validate_json(json.dumps(data), strict=True)  # as JSON: its lists are tuples here
        except ValidationError as error:
            lines = [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False)]
            raise CacheError("\n  ".join([f"{str(file)!r} is not {cls.KIND.what}:", *lines])) from error


class Record(Saved):
    """One search, all budgets."""

    KIND = Format("a record", "dop_search.record", 1, "give the directory of a finished run, or run the search again")
    FILE = RECORD_FILE
    format: Literal["dop_search.record"] = "dop_search.record"
    model: ModelInfo
    data: DataInfo
    selector: Named
    space: Named
    solver: Named
    results: list[Result] = Field(min_length=1)
    floor_ratio: Ratio | None = None
    """FLOPs ratio that no strategy can go below: what the text tokens cost."""
    front: list[Point] = []
    """The Pareto front of the additive surrogate."""
    uniform_front: list[Point] = []
    """The same for ``n_v`` alone."""
    num_validation_runs: Count = 0
    """All passes over the search set, for the curves and all budgets together."""
    seconds: Seconds = 0.0
    timings: dict[str, Seconds] = {}
    """Seconds per stage."""
    scores: SuiteInfo | None = None
    """The benchmarks of the results' scores; ``None`` if no suite ran."""
    provenance: Provenance | None = None

    def all_candidates(self) -> list[Candidate]:
        """Every strategy with an exact KL, each once."""
        items = (item for result in self.results for item in result.candidates)
        return list({(item.describe, item.flops_ratio): item for item in items}.values())


class StrategyScores(Part):
    """One strategy on the suite."""

    name: str
    """Unique in the record; also the folder of its per-sample outputs."""
    file: str
    """Where the strategy was read from, or where that of a fitted method is; empty if no strategy expresses it."""
    strategy: StrategyField | None
    method: dict[str, Any] | None = None
    """What was fitted, with its hyperparameters."""
    flops_ratio: Ratio | None = None
    """As the search that made the strategy measured it on its samples; ``None`` if the file doesn't say."""
    scores: dict[str, ScoreComparison]
    relative_mean: RelativeMean

    @property
    def description(self) -> str:
        """What runs, in a line."""
        return f"{(self.method or {}).get('method')}" if self.strategy is None else self.strategy.describe()


class EvalRecord(Saved):
    """One evaluation; per-sample outputs lie beside it, ``samples/<full or name>/<benchmark>.parquet``."""

    KIND = Format("a record of dop-eval", "dop_search.evaluation", 1, "run dop-eval again")
    FILE = SCORES_FILE
    format: Literal["dop_search.evaluation"] = "dop_search.evaluation"
    model: ModelInfo
    suite: SuiteInfo
    full: dict[str, float]
    """Benchmark → the full model's score."""
    units: dict[str, str]
    num_samples: dict[str, int]
    strategies: list[StrategyScores] = Field(default_factory=list)
    seconds: Seconds = 0.0
    provenance: Provenance | None = None


def save_sample_ids(path: Path, ids: Mapping[str, Sequence[str]], fingerprints: Mapping[str, str]) -> None:
    """Write which samples each set holds: ``{"search": {"fingerprint": …, "ids": […]}, …}``."""
    data = {name: {"fingerprint": fingerprints[name], "ids": list(values)} for name, values in ids.items()}
    write_json(path, data, indent=1)
