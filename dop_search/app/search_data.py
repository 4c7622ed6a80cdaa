"""From a configuration to samples: what a search reads, and that no benchmark scores it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from dop_search.app.config import DataConfig, SearchConfig
from dop_search.data.pools import check_sources, refuse_overlap
from dop_search.data.samples import ValidationSet, no_answer
from dop_search.data.sources import Source, origin
from dop_search.data.validation import Split, file_rows, sources_of, validation_set

if TYPE_CHECKING:
    from dop_search.evaluation.suites import Suite


def needed_splits(config: SearchConfig) -> tuple[Split, ...]:
    """The disjoint sets that a search needs; the test set only for ``eval=accuracy``."""
    judged = config.eval.name == "accuracy" and config.data.num_test > 0
    return ("search", "heldout", "test") if judged else ("search", "heldout")


def load_data(config: SearchConfig) -> dict[Split, ValidationSet]:
    """The samples of the needed splits."""
    return {split: load_split(config.data, split) for split in needed_splits(config)}


def load_split(config: DataConfig, split: Split) -> ValidationSet:
    """The samples of one split, as many as the configuration says.

    Raises:
        DataError: if they cannot be had.
    """
    return validation_set(
        config.name,
        config.sizes[split],
        config.seed,
        split,
        path=config.path,
        families=config.families,
        sources=config.sources,
    )


def data_sources(config: DataConfig) -> tuple[Source, ...]:
    """The splits that search samples are drawn from; none for rendered samples and files.

    Raises:
        DataError: on an unknown name.
    """
    return sources_of(config.name, config.sources)


def check_data(
    config: DataConfig, suite: Suite | None, splits: Sequence[Split], judged: Sequence[Split] = ("test",)
) -> None:
    """Find out before a model is loaded whether the samples can be had, and that the suite does not score them.

    Args:
        config: which samples.
        suite: the benchmarks that judge, if any.
        splits: those that are needed.
        judged: splits whose answers are compared with the annotation.

    Raises:
        DataError: saying what to do.
    """
    refuse_scored_data(config, suite)
    check_sources(data_sources(config))
    if config.name != "jsonl" or config.path is None:
        return
    sizes = {split: config.sizes[split] for split in splits}
    for split, rows in file_rows(config.path, sizes, config.seed, config.families).items():
        for row in rows:
            if not row.answers and (split in judged or config.answers == "ground_truth"):
                raise no_answer(row.where)


def refuse_scored_data(config: DataConfig, suite: Suite | None) -> None:
    """Refuse a search on what the suite scores.

    Raises:
        DataError: naming the source, the benchmark and the split.
    """
    if suite is not None and suite.source == "hub":
        scored = {b.name: origin(b.dataset.path, b.dataset.name, b.dataset.split, None) for b in suite.benchmarks}
        refuse_overlap(data_sources(config), scored)
