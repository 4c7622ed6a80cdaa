"""The 13 benchmarks in their own schemas, filled with rendered questions: what lmms-eval's tasks read offline."""

from dop_search.data.benchmarks.rows import RENDERED_BENCHMARKS, benchmark_file, benchmark_rows

__all__ = ["RENDERED_BENCHMARKS", "benchmark_file", "benchmark_rows"]
