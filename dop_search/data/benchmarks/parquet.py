"""Rendered rows as Parquet files that ``datasets`` reads, made on first use."""

from __future__ import annotations

from pathlib import Path

from dop_search.data.benchmarks.rows import NUM_ROWS, SEED, Row, benchmark_rows
from dop_search.data.tables import quiet
from dop_search.utils.files import write_atomic

VERSION = 1
"""Raise it whenever rows change: the number is part of the files' folder."""


def benchmark_file(benchmark: str, folder: Path) -> Path:
    """The Parquet file of a benchmark's rendered rows below ``folder``; written if it is not there.

    Raises:
        DataError: an unknown benchmark.
    """
    path = folder / rendered_version() / f"{benchmark}.parquet"
    if not path.exists():
        rows = benchmark_rows(benchmark, NUM_ROWS)
        write_atomic(path, lambda temporary: _write(rows, temporary))
    return path


def rendered_version() -> str:
    """Names the rows: another name, other rows."""
    return f"rendered-{VERSION}-{SEED}-{NUM_ROWS}"


def _write(rows: list[Row], path: Path) -> None:
    import datasets

    with quiet():
        datasets.Dataset.from_list(rows).to_parquet(path)
