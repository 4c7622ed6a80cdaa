"""Whether samples can be had, and are not those that a benchmark scores: found out before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence

from dop_search.app.config import DataConfig
from dop_search.data.pools import check_sources, refuse_overlap
from dop_search.data.samples import no_answer
from dop_search.data.sources import Location, Origin
from dop_search.data.validation import Split, file_rows, sources_of
from dop_search.evaluation.suites import Suite


def check_data(config: DataConfig, suite: Suite, splits: Sequence[Split], judged: Sequence[Split] = ("test",)) -> None:
    """Find out before a model is loaded whether the samples can be had, and that no benchmark scores them.
    Answers are needed on the ``judged`` ones of ``splits``, and with ``answers=ground_truth`` on all. Else DataError.
    """
    refuse_scored_data(config, suite)
    check_sources(sources_of(config.name, config.sources))
    if config.name != "jsonl" or config.path is None:
        return
    sizes: dict[Split, int] = {split: config.sizes[split] for split in splits if split != "decision"}
    if "decision" in splits:
        sizes["search"] += config.num_decision  # of one draw
    for split, rows in file_rows(config.path, sizes, config.seed, config.families).items():
        for row in rows:
            if not row.answers and (split in judged or config.answers == "ground_truth"):
                raise no_answer(row.where)


def refuse_scored_data(config: DataConfig, suite: Suite) -> None:
    """Refuse a search on what the suite scores; DataError naming the source, the benchmark and the split."""
    if suite.benchmarks and suite.source == "hub":
        data = {b.name: b.dataset for b in suite.benchmarks}
        scored = {name: Origin.of(Location(its.path, its.name), its.split) for name, its in data.items()}
        refuse_overlap(sources_of(config.name, config.sources), scored)
