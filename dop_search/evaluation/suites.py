"""Suites of benchmarks: frozen dataclasses read from ``conf/eval/*.yaml`` and ``conf/benchmarks.yaml``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from dop_search.evaluation.aggregates import AGGREGATES
from dop_search.utils.conf import config_dir
from dop_search.utils.errors import ConfigError
from dop_search.utils.registry import unknown

SOURCES = ("hub", "rendered")
_CHECKED: dict[str, Any] = {"extra": "forbid"}
NO_BENCHMARKS = ("accuracy", "none")
"""Suites without benchmarks."""


@dataclass(frozen=True)
class HubDataset:
    """A data set on the hub and the split that is scored; see ``conf/benchmarks.yaml``."""

    path: str
    split: str
    name: str | None = None
    revision: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """Where one score comes from; ``conf/benchmarks.yaml`` says what each field means."""

    name: str
    title: str
    yaml: str
    dataset: HubDataset
    metrics: tuple[str, ...]
    unit: str
    aggregate: str = "mean"
    keys: tuple[tuple[str, ...], ...] = ()
    value: str = "number"
    judge: bool = False
    target: str | None = None
    video: bool = False
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Suite:
    """How strategies are judged beyond KL: benchmarks, and how they are run.

    Attributes:
        name: ``accuracy`` (on ``data.num_test`` samples) or ``none``, without benchmarks; or a suite's, e.g.
            ``pocket13``, ``dop13``.
        benchmarks: in the order of the tables; in a configuration by their names in ``conf/benchmarks.yaml``, none:
            those of the suite's file.
        source: ``hub``, the data sets on it, or ``rendered``: rows made by this project in the benchmarks' schemas (no
            network).
        judge: whether a benchmark may ask its GPT judge.
        limit: most samples per benchmark, drawn with a fixed seed; ``None``: all.
        batch_size: samples per generation call.
        max_new_tokens: longest answer, instead of what each benchmark says.

    Raises:
        ConfigError: on a bad value, a suite without benchmarks, or one that has a benchmark twice.
    """

    name: str = "accuracy"
    benchmarks: tuple[Benchmark, ...] = ()
    source: Literal["hub", "rendered"] = "hub"
    judge: bool = True
    limit: int | None = None
    batch_size: int = 16
    max_new_tokens: int | None = None
    __pydantic_config__ = _CHECKED

    def __post_init__(self) -> None:
        names = [benchmark.name for benchmark in self.benchmarks]
        if self.name in NO_BENCHMARKS and names:
            raise ConfigError(f"`name={self.name}` runs no benchmarks, but got {names}; set a suite's name")
        if (self.name not in NO_BENCHMARKS and not names) or len(set(names)) != len(names):
            raise ConfigError(f"suite {self.name!r} needs benchmarks, each once, but got {names}")
        if self.source not in SOURCES:
            raise ConfigError(f"suite {self.name!r}: `source` must be one of {list(SOURCES)}, but got {self.source!r}")
        if not isinstance(self.judge, bool):
            raise ConfigError(f"suite {self.name!r}: `judge` must be true or false, but got {self.judge!r}")
        for field in ("limit", "batch_size", "max_new_tokens"):
            value = getattr(self, field)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"suite {self.name!r}: `{field} >= 1` must hold, but got ({field}={value})")

    def to_json(self) -> dict[str, Any]:
        """The fields as in a configuration: benchmarks of ``conf/benchmarks.yaml`` by their names."""
        shown = [
            item.name if catalogue().get(item.name) == item else dataclasses.asdict(item) for item in self.benchmarks
        ]
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)} | {"benchmarks": shown}


def load_suite(name_or_path: str | Path, **changes: Any) -> Suite:
    """A suite by name or YAML file, with ``changes`` of its fields; ConfigError if there is none or it is malformed."""
    return make_suite(**suite_fields(name_or_path) | changes)


def suite_fields(name_or_path: str | Path) -> dict[str, Any]:
    """The fields of :func:`load_suite`."""
    path = Path(name_or_path)
    if path.suffix not in (".yaml", ".yml"):
        path = config_dir() / "eval" / f"{name_or_path}.yaml"
        if str(name_or_path) not in suite_names():
            raise ConfigError(unknown("suite", str(name_or_path), suite_names()))
    try:
        fields = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"cannot read the suite {str(path)!r}: {error}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{str(path)!r} must hold a mapping with `name` and `benchmarks`, but it holds {fields!r}")
    return fields | {"benchmarks": find_benchmarks(fields.get("benchmarks", ()))}


def make_suite(name: str, benchmarks: Sequence[str | Mapping[str, Any] | Benchmark], **fields: Any) -> Suite:
    """A suite from the fields of its YAML file; ConfigError on an unknown benchmark or field, or a bad value.

    Benchmarks are names from ``conf/benchmarks.yaml``, or mappings of the same form with ``name`` beside the fields.
    """
    known = {field.name for field in dataclasses.fields(Suite)}
    for field in fields:
        if field not in known:
            raise ConfigError(f"suite {name!r}: {unknown('key', field, sorted(known))}")
    return Suite(name, find_benchmarks(benchmarks), **fields)


def find_benchmarks(items: Sequence[str | Mapping[str, Any] | Benchmark]) -> tuple[Benchmark, ...]:
    """Benchmarks by name, or from mappings, see :func:`make_suite`."""
    if not isinstance(items, (list, tuple)):
        raise ConfigError(f"`benchmarks` must be a list, but got {items!r}")
    return tuple(item if isinstance(item, Benchmark) else _benchmark(item) for item in items)


def suite_names() -> tuple[str, ...]:
    """Suites that come with the project."""
    files = sorted((config_dir() / "eval").glob("*.yaml"))
    return tuple(path.stem for path in files if "benchmarks" in (yaml.safe_load(path.read_text("utf-8")) or {}))


@cache
def catalogue() -> dict[str, Benchmark]:
    """Benchmarks of ``conf/benchmarks.yaml`` by name."""
    entries = yaml.safe_load((config_dir() / "benchmarks.yaml").read_text(encoding="utf-8"))
    return {name: _parse(name, fields) for name, fields in entries.items()}


def _benchmark(item: str | Mapping[str, Any]) -> Benchmark:
    if isinstance(item, str):
        if item not in catalogue():
            raise ConfigError(unknown("benchmark", item, catalogue()))
        return catalogue()[item]
    if not isinstance(item, Mapping):
        raise ConfigError(f"a benchmark is a name or a mapping, but got {item!r}")
    fields = dict(item)
    return _parse(str(fields.pop("name", "")), fields)


def _parse(name: str, fields: Mapping[str, Any]) -> Benchmark:
    try:
        benchmark = Benchmark(
            name=name,
            **{
                **fields,
                "dataset": HubDataset(**fields["dataset"]),
                "metrics": tuple(fields["metrics"]),
                "keys": tuple(tuple(key) for key in fields.get("keys", ())),
                "needs": tuple(fields.get("needs", ())),
            },
        )
    except (TypeError, KeyError) as error:
        raise ConfigError(
            f"benchmark {name!r} is malformed ({error}); see conf/benchmarks.yaml for its keys"
        ) from error
    aggregate = AGGREGATES.find(benchmark.aggregate)
    if aggregate.num_keys != len(benchmark.keys):
        raise ConfigError(
            f"benchmark {name!r}: the aggregate {aggregate.name!r} needs {aggregate.num_keys} keys, but got "
            f"{list(benchmark.keys)}"
        )
    return benchmark
