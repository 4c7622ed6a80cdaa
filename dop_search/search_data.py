"""From a configuration to samples: what a search reads, and that no benchmark scores it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dop_search.config import DataConfig, SearchConfig
from dop_search.data.named import named_sources
from dop_search.data.pools import check_sources, refuse_overlap
from dop_search.data.samples import ValidationSet
from dop_search.data.sources import Source, origin
from dop_search.data.validation import Split, validation_set

if TYPE_CHECKING:
    from dop_search.evaluation.suites import Suite


def load_data(config: SearchConfig) -> dict[Split, ValidationSet]:
    """The disjoint sets that a search needs; the test set only for ``eval=accuracy``."""
    splits: list[Split] = ["search", "heldout"]
    if config.eval.name == "accuracy" and config.data.num_test:
        splits.append("test")
    return {split: load_split(config.data, split) for split in splits}


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
    """The splits that search samples are drawn from; none for rendered samples and files."""
    if config.sources or config.name in ("pocket", "jsonl"):
        return config.sources
    return named_sources(config.name) or ()


def check_data(config: DataConfig, suite: Suite | None) -> None:
    """Find out before a model is loaded whether the samples can be had, and that the suite does not score them.

    Raises:
        DataError: saying what to do.
    """
    refuse_scored_data(config, suite)
    check_sources(data_sources(config))


def refuse_scored_data(config: DataConfig, suite: Suite | None) -> None:
    """Refuse a search on what the suite scores.

    Raises:
        DataError: naming the source, the benchmark and the split.
    """
    if suite is not None and suite.source == "hub":
        scored = {b.name: origin(b.dataset.path, b.dataset.name, b.dataset.split, None) for b in suite.benchmarks}
        refuse_overlap(data_sources(config), scored)
