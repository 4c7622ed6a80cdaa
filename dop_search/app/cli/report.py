"""``dop-report RUN_DIR``: the table, the pictures and the page of a finished run again."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dop_search.app.record import Record
from dop_search.app.report.scores import score_summary
from dop_search.app.report.table import summary
from dop_search.app.report.write import load_curves, write_report
from dop_search.utils.errors import DopError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dop-report", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="directory with record.json, e.g. outputs/2026-01-02/03-04-05")
    parser.add_argument("--output", type=Path, help="where to write instead of the run directory")
    options = parser.parse_args(arguments)
    try:
        record = Record.load(options.run_dir / "record.json")
        paths = write_report(record, load_curves(options.run_dir), options.run_dir, options.output)
    except DopError as error:
        print(f"dop-report: {error}", file=sys.stderr)
        return 1
    console = Console()
    console.print(summary(record))
    scores = score_summary(record)
    if scores is not None:
        console.print()
        console.print(scores)
    console.print(f"{len(paths)} files, open {paths[0]}", highlight=False, markup=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
