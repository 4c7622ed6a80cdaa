"""``dop-search``: compose by Hydra, validate, run the pipeline, print the table."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from hydra.types import RunMode
from omegaconf import DictConfig
from rich.console import Console

from dop_search.config import CONFIG_NAME, config_dir, parse_config
from dop_search.errors import DopError
from dop_search.progress import default_progress

log = logging.getLogger(__name__)


def main() -> None:
    """Entry point: one search, or with ``-m`` one per combination. Exit status 1 on a user's error, 130 on Ctrl-C."""
    try:
        directory = config_dir()
    except DopError as error:
        sys.exit(f"dop-search: {error}")
    # Hydra's own `--help` and errors need neither torch nor mlflow, so those are imported only to run.
    command = hydra.main(version_base="1.3", config_path=str(directory), config_name=CONFIG_NAME)(_job)
    try:
        command()
    except KeyboardInterrupt:
        print("\ndop-search: interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)


def _job(composed: DictConfig) -> None:
    """One search; a :class:`DopError` is shown by Hydra without a traceback (``HYDRA_FULL_ERROR=1`` shows it)."""
    try:
        run_search(composed, Path(HydraConfig.get().runtime.output_dir))
    except DopError as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            log.error("%s", error)  # Hydra runs the rest of the sweep and reports only the first error, at the end
        raise CompactHydraException(f"dop-search: {error}") from error


def run_search(composed: DictConfig, run_dir: Path) -> None:
    """Validate the configuration, search, and print the summary and where everything lies.

    Raises:
        DopError: for anything the user can mend.
    """
    config = parse_config(composed)
    from dop_search.tracking import check_tracking, ui_command

    check_tracking(config.tracking)
    from dop_search.pipeline import run
    from dop_search.report import summary
    from dop_search.report.scores import score_summary

    record = run(config, run_dir, default_progress())
    console = Console()
    console.print()
    console.print(summary(record))
    console.print()
    scores = score_summary(record)
    if scores is not None:
        console.print(scores)
        console.print()
    lines = [f"Strategies, record, curves, plots: {os.path.relpath(run_dir)}"]
    lines.append(f"Report:   {os.path.relpath(run_dir / 'report.html')}")
    interface = ui_command(config.tracking)
    if interface is not None:
        lines.append(f"Compare:  {interface}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
