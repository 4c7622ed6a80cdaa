"""What can be configured: one frozen pydantic model per Hydra group, unknown keys forbidden."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PlainSerializer,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from dop_search.app.config.section import Listed, Section
from dop_search.app.config.solvers import JointConfig, SolverConfig, Storage
from dop_search.data.sources import DatasetSource, TaskSource
from dop_search.data.validation import OWN, Split
from dop_search.evaluation.suites import NO_BENCHMARKS, Suite, find_benchmarks, load_suite, suite_fields
from dop_search.strategy.cost import Budget


def _dotted(name: str) -> str:
    if not all(part.isidentifier() for part in name.split(".")):
        raise ValueError(f"a module is named as in Python, e.g. my_selectors or my_package.selectors, not {name!r}")
    return name


AsList = BeforeValidator(lambda value: () if value is None else value if isinstance(value, (list, tuple)) else (value,))
"""One may stand without a list, and none may be ``null``."""
Names = Annotated[Listed[str], AsList]
"""Names or files; one may stand without a list."""
Imports = Annotated[
    Listed[Annotated[str, AfterValidator(_dotted)]],
    BeforeValidator(lambda value: (value,) if isinstance(value, str) else value),
]
"""Names of modules; one may stand without a list."""


class ModelConfig(Section):
    """Which model to prune and how to load it."""

    name_or_path: str = Field(default="pocket", min_length=1)
    """``pocket`` (bundled), ``smollm2`` and ``smol_llava`` (extra ``smollm2``), a local directory, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint; pin a commit for results that you publish."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """``auto``: the checkpoint's on an accelerator, float32 on a CPU."""
    device: str = "auto"
    """``auto`` (an accelerator if there is one), ``cpu``, ``cuda``, ``cuda:1``, …"""
    device_map: str | None = None
    """Spread the weights over GPUs by accelerate, e.g. ``auto``; excludes ``device``."""
    quantization: Literal["bnb4", "bnb8", "int8"] | None = None
    """The decoder's weights in fewer bits: ``bnb4``, ``bnb8`` need bitsandbytes, ``int8`` needs torchao."""
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
    """``flash_attention_2`` needs flash-attn, a GPU and half precision; ``sdpa`` has the same kernels without it."""
    trust_remote_code: bool = False
    """Whether code that comes with a checkpoint may run."""

    @model_validator(mode="after")
    def _one_placement(self) -> ModelConfig:
        if self.device_map is not None and self.device != "auto":
            raise ValueError(
                f"`device` and `device_map` exclude each other, but got (device={self.device!r}, "
                f"device_map={self.device_map!r}); set one of them to its default (auto, null)"
            )
        return self


SourceConfig = Annotated[TaskSource | DatasetSource, Field(discriminator="kind")]
"""Where samples come from; the key ``kind`` says which."""


FINAL_SEED = 20_261_128
"""Of the final set, which ``experiment=final`` alone measures on."""


class DataConfig(Section):
    """Which samples measure the divergence and the accuracy; the three sets are disjoint."""

    name: str = Field(default="pocket", min_length=1)
    """``pocket`` (rendered by this project), ``passages`` (text, for ``smollm2`` and the like), ``jsonl`` (a file of
    your own), or any name with ``sources``."""
    path: str | None = None
    """The file of ``name=jsonl``; every third image belongs to the same of the three sets."""
    sources: Listed[SourceConfig] = ()
    """Splits of benchmarks (``kind: task``) and of data sets (``kind: dataset``) to draw from, by their weights."""
    num_samples: PositiveInt = 96
    """Samples of the search set: curves and re-ranking see only these."""
    num_decision: NonNegativeInt = 96
    """Further samples of that draw, which decide among the last few strategies of ``search=joint``; 0: the search set
    does."""
    num_heldout: PositiveInt = 192
    """Samples that confirm the chosen strategy; the search never sees them."""
    num_test: NonNegativeInt = 204
    """Samples with ground-truth answers for the task accuracy; 0: no accuracy."""
    families: Annotated[Listed[str], Field(min_length=1)] | None = None
    """Kinds of question to use; ``null``: all."""
    answers: Literal["teacher", "ground_truth"] = "teacher"
    """Whose answer is teacher-forced: the full model's greedy one (label-free), or the annotation."""
    max_new_tokens: PositiveInt = 16
    """Longest answer."""
    averaging: Literal["per_sample", "per_token"] = "per_sample"
    """Mean of the KL: over answer positions first and samples then, or over all positions at once."""
    seed: NonNegativeInt = 0
    """Of drawing or rendering the samples."""

    @field_validator("seed")
    @classmethod
    def _is_not_final(cls, value: int) -> int:
        if value == FINAL_SEED:
            raise ValueError(f"{FINAL_SEED} is the seed of the final set: experiment=final; take another")
        return value

    @property
    def sizes(self) -> dict[Split, int]:
        """Samples per split."""
        return {
            "search": self.num_samples,
            "heldout": self.num_heldout,
            "test": self.num_test,
            "decision": self.num_decision,
        }

    @model_validator(mode="after")
    def _file_given(self) -> DataConfig:
        if self.name == "jsonl" and self.path is None:
            raise ValueError("`name=jsonl` needs a file; set data.path=FILE.jsonl")
        if self.sources and self.name in OWN:
            raise ValueError(f"`sources` need a `name` of their own, but got (name={self.name!r}); set data.name=MINE")
        return self


class SelectorConfig(Section):
    """Which visual tokens come first when not all enter the decoder."""

    name: str = Field(default="cls_attention", min_length=1)
    """A selector of ``dop_search.selectors``."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the selector, e.g. ``{seed: 0}`` for ``random``."""
    also: Listed[str] = ()
    """Further selectors that ``search=joint`` may choose; those that the model cannot have are left out."""


class SpaceConfig(Section):
    """Which strategies are searched: exit depths per module and group, and the number of visual tokens."""

    name: Literal["dop", "dop_split", "dop_full_kv", "dop_groups", "uniform"] = "dop_split"
    """``dop``: one depth for attention and one for MLP; ``dop_split``: queries and keys/values apart; ``dop_full_kv``:
    that with keys/values in every layer; ``dop_groups``: ``dop_split`` per group of tokens; ``uniform``: the number of
    tokens alone."""
    shares: Listed[float] = (1.0,)
    """Share of the kept visual tokens per group, best-ranked first; sums to 1."""
    num_depth_levels: Annotated[int, Field(ge=2)] | None = None
    """Exit depths measured per curve, the others are interpolated; ``null``: every depth."""
    num_token_levels: int = Field(default=12, ge=2)
    """Numbers of visual tokens measured; every integer between is interpolated and can be chosen."""
    also: Listed[Literal["dop", "dop_split", "dop_full_kv", "dop_groups", "gsop", "uniform"]] = ()
    """Further spaces that ``search=joint`` may choose; ``gsop``: GSOP's trajectory with any number of tokens."""

    @model_validator(mode="after")
    def _shares_fit(self) -> SpaceConfig:
        if any(share <= 0.0 for share in self.shares) or abs(sum(self.shares) - 1.0) > 1e-6:
            raise ValueError(f"`shares` must be positive and sum to 1, but got {list(self.shares)}")
        if self.name == "dop_groups" and len(self.shares) < 2:
            raise ValueError(f"`name=dop_groups` needs 2 or more `shares`, but got {list(self.shares)}")
        if self.name != "dop_groups" and len(self.shares) > 1:
            raise ValueError(f"`name={self.name}` has one group of tokens, but got shares={list(self.shares)}")
        return self


def _suite(value: Any) -> Any:
    """A mapping with its benchmarks: those that it names, or else those of the suite's file."""
    if not isinstance(value, Mapping):
        return value
    fields = dict(value)
    if not fields.get("benchmarks") and fields.get("name", NO_BENCHMARKS[0]) not in NO_BENCHMARKS:
        fields.pop("benchmarks", None)
        fields = suite_fields(str(fields["name"])) | fields
    fields["benchmarks"] = find_benchmarks(fields.get("benchmarks", ()))
    is_known = fields.keys() <= {field.name for field in dataclasses.fields(Suite)}
    return Suite(**fields) if is_known else fields  # pydantic names keys near to an unknown one


BudgetConfig = Annotated[Budget, BeforeValidator(Budget.of)]
"""A number is a FLOPs ratio; a mapping names another cost."""

SuiteConfig = Annotated[Suite, BeforeValidator(_suite), PlainSerializer(Suite.to_json)]
"""How strategies are judged beyond KL."""


class TrackingConfig(Section):
    """Where the search is logged."""

    backend: Literal["mlflow", "none"] = "mlflow"
    """``none``: the files in the run directory are all there is."""
    uri: str = "sqlite:///mlflow.db"
    """MLflow tracking store; a relative SQLite path is taken from the working directory."""
    artifact_location: str | None = None
    """``null``: the folder ``mlartifacts`` beside the SQLite file, or the server's own."""
    experiment: str = Field(default="dop-search", min_length=1)
    """MLflow experiment; made if it is missing."""
    run_name: str | None = None
    """``null``: model, space, budgets, seed and selector."""
    system_metrics: bool = False
    """Log the load of CPU, memory, disk, network and NVIDIA GPUs (with nvidia-ml-py) during a search."""


class StudyConfig(Section):
    """A study instead of one search: a table of rows, see ``experiments/README.md``."""

    name: str = Field(min_length=1)
    """``compare``, ``additive_vs_exact``, …: the files in ``conf/experiment`` that set it are the way to choose one."""
    folder: str | None = None
    """Where ``result.json`` and the figures are written; rows that are there are not measured again. ``null``:
    ``outputs/NAME``."""
    published: str | None = None
    """A folder of the repository, or any other, with a result to begin a new ``folder`` with: its rows are not measured
    again where model, samples and options are the same. ``null``: every row is measured."""
    workers: PositiveInt = 1
    """Processes that share the rows; with more than one, each computes on ``num_threads`` threads, or on one."""
    options: dict[str, Any] = Field(default_factory=dict)
    """The study's own options, see the studies below."""

    @property
    def path(self) -> str:
        """The folder."""
        return self.folder or f"outputs/{self.name}"


class SearchConfig(Section):
    """Everything that one search, or one study, depends on."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig(num_heldout=500)
    selector: SelectorConfig = SelectorConfig(name="divprune_lazy", also=("vispruner",))
    space: SpaceConfig = SpaceConfig(also=("gsop",))
    budget: Annotated[Listed[BudgetConfig], AsList] = (
        Budget(flops_ratio=0.5),
        Budget(flops_ratio=0.3),
        Budget(flops_ratio=0.15),
    )
    """A number is a FLOPs ratio; ``{kv_ratio: 0.3}`` or ``{latency_ratio: 0.3}`` limits another cost; a list searches
    each."""
    search: SolverConfig = JointConfig()
    eval: SuiteConfig = Suite()
    """How the found strategies are judged beyond KL."""
    study: StudyConfig | None = None
    """A table to measure instead of one search; ``null``: search."""
    tracking: TrackingConfig = TrackingConfig()
    batch_size: PositiveInt = 16
    """Most samples per generation call."""
    memory: Literal["auto"] | Annotated[float, Field(gt=0.0)] = "auto"
    """GiB of the model's device that a search may fill, weights included; ``auto``: most of what is free. Samples are
    batched and hidden states are kept by it; the numbers do not depend on it."""
    plan: bool = False
    """Print what the search would hold and compute, stage by stage, from configurations alone, and run nothing."""
    cache_dir: str = Field(default=".cache/dop_search", min_length=1)
    """Teacher and divergences, keyed by content: the same command again continues where it stopped."""
    storage: Storage | None = None
    """Where several processes share one search, also the study of ``exact_optuna``: a journal file, or a database URL
    such as ``postgresql+psycopg://user@host/db``. ``null``: this process searches alone."""
    seed: NonNegativeInt = 0
    """Of the solvers' samplers and of the bootstrap."""
    num_threads: PositiveInt | None = None
    """CPU threads of torch; ``null``: torch's default."""
    imports: Imports = ()
    """Modules of your own, on the path or in ``PYTHONPATH``, that register selectors, model families, methods,
    solvers or studies; imported before anything is looked up by name."""

    @field_validator("budget", mode="after")
    @classmethod
    def _all_different(cls, budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
        plain = [budget.plain for budget in budgets]
        if not plain:
            raise ValueError("at least one budget is needed, e.g. budget=0.3, but got []")
        if any(plain.count(item) > 1 for item in plain):
            raise ValueError(f"the budgets must differ, but got {plain}")
        return budgets


class EvalRunConfig(Section):
    """Everything that one ``dop-eval`` depends on."""

    model: ModelConfig = ModelConfig()
    eval: SuiteConfig = Field(default_factory=lambda: load_suite("pocket13"))
    """The benchmarks."""
    strategy: Names = ()
    """Strategy files; a file or a list of files. Neither these nor ``method``: the full model alone."""
    method: Names = ()
    """Methods to fit and score: published ones by name, ``uniform``, our searches (``dop_split``, …), or any that ranks
    by a selector as ``NAME@SELECTOR``; one or a list."""
    flops_ratio: Annotated[Listed[Annotated[float, Field(gt=0.0, le=1.0)]], AsList] = ()
    """Shares of the full model's FLOPs that each method is fitted to; one or a list."""
    data: DataConfig = DataConfig(num_heldout=500)
    """Methods are fitted on its search samples."""
    selector: SelectorConfig = SelectorConfig()
    """Ranks for the methods that bring no ranking."""
    tracking: TrackingConfig = TrackingConfig()
    cache_dir: str = Field(default=".cache/dop_search", min_length=1)
    """Scores, keyed by content: what was measured of the full model or of a strategy is not measured again."""
    seed: NonNegativeInt = 0
    """Of the bootstrap."""
    num_threads: PositiveInt | None = None
    """CPU threads of torch; ``null``: torch's default."""
    imports: Imports = ()
    """As with ``dop-search``."""

    @field_validator("strategy", "method", "flops_ratio", mode="after")
    @classmethod
    def _each_once(cls, items: tuple[Any, ...], info: ValidationInfo) -> tuple[Any, ...]:
        if len(set(items)) < len(items):
            raise ValueError(f"each {info.field_name} is given once, but got {list(items)}")
        return items

    @model_validator(mode="after")
    def _methods_have_ratios(self) -> EvalRunConfig:
        if bool(self.method) != bool(self.flops_ratio):
            raise ValueError(
                f"methods are fitted to shares of the full model's FLOPs, but got (method={list(self.method)}, "
                f"flops_ratio={list(self.flops_ratio)}); give both, as in method=fastv flops_ratio=0.3"
            )
        return self

    @field_validator("eval", mode="after")
    @classmethod
    def _runs_benchmarks(cls, value: Suite) -> Suite:
        if not value.benchmarks:
            raise ValueError(
                f"dop-eval runs a suite of benchmarks, e.g. eval=pocket13 or eval=dop13, not {value.name!r}"
            )
        return value
