"""Rendered rows as Parquet files that ``datasets`` reads, made on first use."""

from __future__ import annotations

import io
import json
from pathlib import Path

from dop_search.data.benchmarks.rows import NUM_ROWS, SEED, Row, benchmark_rows
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
    import pyarrow as pa
    import pyarrow.parquet as pq

    encoded = [{**row, "image": {"bytes": _png(row), "path": None}} for row in rows]
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    table = pa.Table.from_pylist(encoded)
    columns = [table[name].cast(image) if name == "image" else table[name] for name in table.column_names]
    table = pa.table(dict(zip(table.column_names, columns, strict=True)))
    pq.write_table(table.replace_schema_metadata({"huggingface": json.dumps(_features(table))}), path)


def _png(row: Row) -> bytes:
    buffer = io.BytesIO()
    row["image"].save(buffer, format="PNG")
    return buffer.getvalue()


def _features(table: object) -> dict[str, object]:
    """What ``datasets`` writes into its own Parquet files, so that ``image`` is read as an image."""
    import datasets

    schema = table.schema  # type: ignore[attr-defined]
    features = datasets.Features.from_arrow_schema(schema)
    features["image"] = datasets.Image()
    return {"info": {"features": features.to_dict()}}
