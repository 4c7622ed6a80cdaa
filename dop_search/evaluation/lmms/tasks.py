"""A suite as lmms-eval tasks: generated YAML that includes lmms-eval's own file and changes only where rows come from,
the longest answer where the suite sets one and, without a judge, which of its metrics is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dop_search.data.benchmarks import RENDERED_BENCHMARKS, benchmark_file
from dop_search.data.tasks import task_fields, tasks_root
from dop_search.evaluation.aggregates import AGGREGATES
from dop_search.evaluation.lmms import gqa
from dop_search.evaluation.suites import Benchmark, Suite
from dop_search.utils.errors import ConfigError
from dop_search.utils.files import write_text_atomic

_STATIC_METRICS = {
    "mmbench_en": {"gpt_eval_score": "dop_search.evaluation.lmms.values.static_mmbench_en"},
    "mmbench_cn": {"gpt_eval_score": "dop_search.evaluation.lmms.values.static_mmbench_cn"},
    "hallusionbench": {
        name: f"lmms_eval.tasks.hallusion_bench.evaluate_hb.hb_aggregation_result_{name}_intern"
        for name in ("aAcc", "qAcc", "fAcc")
    },
}
"""``Benchmark.value`` → metric → aggregation that asks no judge."""

_CIDER_ALONE = {
    name: {f"{name}_CIDEr": f"lmms_eval.tasks.{name}.utils.{name}_cider"} for name in ("nocaps", "textcaps")
}
"""The six other metrics of captions take most of the time and are not the score."""

_JUDGED_BY_SAMPLE = ("mmbench_en", "mmbench_cn")
"""Their judge is asked once per sample when values are read, and not again for lmms-eval's aggregate."""


class _Function(str):
    """A YAML scalar with lmms-eval's tag ``!function``."""


class _Dumper(yaml.SafeDumper):  # type: ignore[misc]
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def task_name(suite: Suite, benchmark: Benchmark) -> str:
    """What the generated task is called, e.g. ``pocket13_gqa``."""
    return f"{suite.name}_{benchmark.name}"


def write_tasks(suite: Suite, folder: Path, data_dir: Path, revisions: dict[str, str] | None = None) -> Path:
    """Write one YAML file per benchmark, and the group ``suite.name``, into ``folder / suite.name``.

    ``lmms-eval --include_path FOLDER --tasks SUITE --model dop ...`` then runs the same tasks. Rendered rows are made
    in ``data_dir`` on first use; ``revisions``: hub data set → commit.

    Raises:
        ConfigError: if a benchmark has no rendered rows, or no task file in lmms-eval.
    """
    target = folder / suite.name
    for benchmark in suite.benchmarks:
        if benchmark.name == "gqa" and suite.source == "hub":
            revision = (revisions or {}).get(benchmark.dataset.path) or benchmark.dataset.revision
            write_text_atomic(target / "gqa_images.py", gqa.SOURCE.format(revision=revision))
        text = yaml.dump(_task(suite, benchmark, data_dir, revisions or {}), Dumper=_Dumper, sort_keys=False)
        write_text_atomic(target / f"{benchmark.name}.yaml", text)
    group = {"group": suite.name, "task": [task_name(suite, benchmark) for benchmark in suite.benchmarks]}
    write_text_atomic(target / "_group.yaml", yaml.safe_dump(group, sort_keys=False))
    return target


def _task(suite: Suite, benchmark: Benchmark, data_dir: Path, revisions: dict[str, str]) -> dict[str, Any]:
    original = tasks_root() / benchmark.yaml
    if not original.is_file():
        raise ConfigError(
            f"benchmark {benchmark.name!r}: lmms-eval has no task file {str(original)!r}; install the version that "
            'pyproject.toml names: pip install "dop-search[eval]"'
        )
    task: dict[str, Any] = {"include": str(original), "task": task_name(suite, benchmark)}
    if suite.source == "rendered":
        if benchmark.name not in RENDERED_BENCHMARKS:
            raise ConfigError(
                f"suite {suite.name!r}: {benchmark.name!r} has no rendered rows; there are "
                f"{', '.join(RENDERED_BENCHMARKS)}"
            )
        path = benchmark_file(benchmark.name, data_dir).resolve()
        task |= {
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {benchmark.dataset.split: str(path)},
                "cache_dir": str((data_dir / "arrow").resolve()),
            },
            "process_docs": None,
        }
    elif not benchmark.video:  # for videos lmms-eval's own arguments say where archives are unpacked
        revision = revisions.get(benchmark.dataset.path) or benchmark.dataset.revision
        task["dataset_kwargs"] = {"revision": revision} if revision else {}
        if benchmark.name == "gqa":
            task["process_docs"] = _Function("gqa_images.with_images_at_revision")
    if suite.max_new_tokens is not None:  # an included file's mapping is replaced as a whole
        options = task_fields(original).get("generation_kwargs") or {"do_sample": False}
        task["generation_kwargs"] = options | {"max_new_tokens": suite.max_new_tokens}
    metrics = _CIDER_ALONE if benchmark.value in _CIDER_ALONE else {} if suite.judge else _STATIC_METRICS
    if benchmark.value in metrics:
        task["metric_list"] = [
            {"metric": metric, "aggregation": _Function(function), "higher_is_better": True}
            for metric, function in metrics[benchmark.value].items()
        ]
    elif suite.judge and benchmark.value in _JUDGED_BY_SAMPLE:
        task["metric_list"] = []
    return task


def task_manager(folder: Path) -> Any:
    """lmms-eval's index of the tasks below ``folder`` alone; indexing its own takes ten seconds."""
    from lmms_eval.tasks import TaskManager

    return TaskManager("ERROR", include_path=str(folder), include_defaults=False, model_name="dop")


def load_task(suite: Suite, benchmark: Benchmark, manager: Any) -> Any:
    """The lmms-eval task object of a benchmark, from what :func:`write_tasks` wrote.

    It is loaded afresh each time, since OCRBench keeps its count in a global of the task's own module.
    """
    name = task_name(suite, benchmark)
    return manager.load_task_or_group([name], "simple")[name]


def scored_rows(benchmark: Benchmark, docs: Any, limit: int | None) -> list[int]:
    """Indices of the rows to score: all, or about ``limit`` of them in whole units, drawn with a fixed seed.

    Units (MME's pairs, the rotations of a question, HallusionBench's sets) are kept whole; at least one is taken. A
    lower limit takes some of the rows of a higher one. Not the first rows, nor every n-th: benchmarks are ordered by
    category, and POPE's answers alternate.
    """
    if limit is None or limit >= len(docs):
        return list(range(len(docs)))
    units = _units(benchmark, docs)
    count = max(1, limit * len(units) // len(docs))
    order = np.random.default_rng(0).permutation(len(units))
    return sorted(row for index in order[:count] for row in units[index])


def _units(benchmark: Benchmark, docs: Any) -> list[list[int]]:
    if not AGGREGATES.find(benchmark.aggregate).whole_units:
        return [[row] for row in range(len(docs))]
    keys = benchmark.keys if benchmark.aggregate == "mme" else benchmark.keys[:1]
    columns = [np.asarray(docs[column]) for key in keys for column in key]
    units: dict[tuple[str, ...], list[int]] = {}
    for row in range(len(docs)):
        name = tuple(str(column[row]) for column in columns)
        if benchmark.aggregate == "circular":
            name = (str(int(name[0]) % 1_000_000),)
        units.setdefault(name, []).append(row)
    return list(units.values())


def keep_rows(task: Any, split: str, rows: Sequence[int]) -> None:
    """Make ``task`` see only these rows of its split."""
    tables = {id(docs): docs for docs in (task.dataset, task.dataset_no_image)}  # tasks may have one for both
    for docs in tables.values():
        docs[split] = docs[split].select(list(rows))
    task.task_docs = task.dataset[split]
