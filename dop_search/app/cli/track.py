"""``dop-track RUN_DIR …``: log finished searches to MLflow, with their own times; for runs whose store was away."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dop_search.app.config import TrackingConfig
from dop_search.app.record import RECORD_FILE, Record
from dop_search.app.tracking.connection import ui_command
from dop_search.app.tracking.store import log_search
from dop_search.utils.errors import DopError


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    defaults = TrackingConfig()
    parser = argparse.ArgumentParser(prog="dop-track", description=__doc__)
    parser.add_argument("run_dir", type=Path, nargs="+", help="directory with record.json, as a search has left it")
    parser.add_argument("--uri", default=defaults.uri, help="the store (%(default)s)")
    parser.add_argument("--experiment", default=defaults.experiment, help="name of the experiment (%(default)s)")
    options = parser.parse_args(arguments)
    config = TrackingConfig(uri=options.uri, experiment=options.experiment)
    try:
        records = [(folder, Record.load(folder / RECORD_FILE)) for folder in options.run_dir]
        for folder, record in records:
            print(f"{folder}: run {log_search(config, record, folder)}")
    except DopError as error:
        print(f"dop-track: {error}", file=sys.stderr)
        return 1
    print(f"Compare:  {ui_command(config)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
