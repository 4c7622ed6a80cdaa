"""Commands on finished searches: ``dop-report`` draws and prints them again, ``dop-track`` logs them to MLflow."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from dop_search.app.cli.entry import answer
from dop_search.app.config import TrackingConfig
from dop_search.app.record import RECORD_FILE, Record
from dop_search.app.report.scores import score_summary
from dop_search.app.report.table import summary
from dop_search.app.report.write import load_curves, write_report


def report(arguments: Sequence[str] | None = None) -> int:
    """``dop-report RUN_DIR``: the table, the pictures and the page of a finished run again; returns the exit status."""
    parser = argparse.ArgumentParser(prog="dop-report", description="Draw a finished run again, and print its table.")
    parser.add_argument("run_dir", type=Path, help="directory with record.json, e.g. outputs/2026-01-02/03-04-05")
    parser.add_argument("--output", type=Path, help="where to write instead of the run directory")
    return answer(parser, arguments, _report)


def track(arguments: Sequence[str] | None = None) -> int:
    """``dop-track RUN_DIR …``: log finished searches, with their own times; for runs whose store was away."""
    defaults = TrackingConfig()
    parser = argparse.ArgumentParser(
        prog="dop-track", description="Log finished searches to MLflow, for runs whose store was away."
    )
    parser.add_argument("run_dir", type=Path, nargs="+", help="directory with record.json, as a search has left it")
    parser.add_argument("--uri", default=defaults.uri, help="the store (%(default)s)")
    parser.add_argument("--experiment", default=defaults.experiment, help="name of the experiment (%(default)s)")
    return answer(parser, arguments, _track)


def _report(options: argparse.Namespace) -> None:
    record = Record.load(options.run_dir / RECORD_FILE)
    paths = write_report(record, load_curves(options.run_dir), options.run_dir, options.output)
    console = Console()
    for table in filter(None, (summary(record), score_summary(record))):
        console.print(table)
        console.print()
    console.print(f"{len(paths)} files, open {paths[0]}", highlight=False, markup=False, soft_wrap=True)


def _track(options: argparse.Namespace) -> None:
    from dop_search.app.tracking.connection import ui_command
    from dop_search.app.tracking.store import log_search

    config = TrackingConfig(uri=options.uri, experiment=options.experiment)
    records = [(folder, Record.load(folder / RECORD_FILE)) for folder in options.run_dir]
    for folder, record in records:
        print(f"{folder}: run {log_search(config, record, folder)}")
    print(f"Compare:  {ui_command(config)}")
