"""Whether everything a suite needs is there, found out before anything is measured."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from dop_search.evaluation.suites import HubDataset, Suite
from dop_search.models.loading import hub_is_reachable
from dop_search.utils.errors import ConfigError, DataError


def check_suite(suite: Suite) -> None:
    """Refuse a suite that cannot be scored here.

    Raises:
        ConfigError: without a program or key that a benchmark needs.
        DataError: if data sets are neither cached nor can be downloaded; names the variables that point to a cache.
    """
    for benchmark in suite.benchmarks:
        for program in benchmark.needs:
            if shutil.which(program) is None:
                raise ConfigError(
                    f"{benchmark.title} is scored by a tool that needs `{program}`, which is not installed"
                )
    judged = [benchmark.title for benchmark in suite.benchmarks if benchmark.judge]
    if suite.judge and judged and not os.environ.get("OPENAI_API_KEY"):
        raise ConfigError(
            f"{', '.join(judged)} may ask a GPT judge, but OPENAI_API_KEY is not set; set it, or score without a "
            "judge: eval=dop13_static (or eval.judge=false)"
        )
    if suite.source == "hub":
        missing = sorted({b.dataset.path for b in suite.benchmarks if _cached_commit(b.dataset) is None})
        if missing and not hub_is_reachable():
            raise DataError(
                f"the suite {suite.name!r} needs data sets that are not cached, and the hub cannot be reached: "
                f"{', '.join(missing)}\nPoint to a cache that has them: HF_HOME=DIR (or HF_HUB_CACHE=DIR/hub), or use "
                "the rendered suite, which needs no network: eval=pocket13"
            )


def revisions_of(suite: Suite) -> dict[str, str]:
    """Data set → commit, for every data set of a hub suite: the pinned one, else the newest, else (offline) the cached.

    Empty for a rendered suite.
    """
    if suite.source != "hub":
        return {}
    datasets = {benchmark.dataset.path: benchmark.dataset for benchmark in suite.benchmarks}
    reachable = any(d.revision is None for d in datasets.values()) and hub_is_reachable()
    return {path: dataset.revision or _newest(dataset, reachable) for path, dataset in datasets.items()}


def _newest(dataset: HubDataset, reachable: bool) -> str:
    if reachable:
        from huggingface_hub import HfApi

        commit = HfApi().dataset_info(dataset.path).sha
    else:
        commit = _cached_commit(dataset)
    if commit is None:
        raise DataError(f"cannot find out the commit of the data set {dataset.path!r}; pin it: conf/benchmarks.yaml")
    return commit


def _cached_commit(dataset: HubDataset) -> str | None:
    """The commit of a data set in the hub's cache: the pinned one, what ``main`` was when it was last asked, or the
    newest: a download of a pinned commit leaves no ``main``."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"datasets--{dataset.path.replace('/', '--')}"
    if dataset.revision is not None:
        return dataset.revision if (folder / "snapshots" / dataset.revision).is_dir() else None
    reference = folder / "refs" / "main"
    if reference.is_file():
        return reference.read_text().strip()
    snapshots = sorted((folder / "snapshots").glob("*"), key=lambda path: path.stat().st_mtime)
    return snapshots[-1].name if snapshots else None
