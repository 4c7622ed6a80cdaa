"""``dop-eval``: score a full model and its pruned versions on a suite of benchmarks; composed by Hydra."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import CompactHydraException
from omegaconf import DictConfig
from rich.console import Console

from dop_search.config import EvalRunConfig, config_dir, parse_as
from dop_search.errors import DopError
from dop_search.progress import default_progress

EVAL_CONFIG_NAME = "eval_config"
"""The primary config: ``conf/eval_config.yaml``."""


def main() -> None:
    """Entry point. Exit status 1 on a user's error, 130 on Ctrl-C."""
    try:
        directory = config_dir()
    except DopError as error:
        sys.exit(f"dop-eval: {error}")
    command = hydra.main(version_base="1.3", config_path=str(directory), config_name=EVAL_CONFIG_NAME)(_job)
    try:
        command()
    except KeyboardInterrupt:
        print("\ndop-eval: interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)


def _job(composed: DictConfig) -> None:
    try:
        run_evaluation(composed, Path(HydraConfig.get().runtime.output_dir))
    except DopError as error:
        raise CompactHydraException(f"dop-eval: {error}") from error


def run_evaluation(composed: DictConfig, run_dir: Path) -> None:
    """Validate the configuration, score, and print the tables and where everything lies.

    Raises:
        DopError: for anything the user can mend.
    """
    config = parse_as(composed, EvalRunConfig)
    from dop_search.tracking import check_tracking, ui_command

    check_tracking(config.tracking)
    from dop_search.eval_pipeline import evaluate
    from dop_search.report.scores import eval_summary

    record = evaluate(config, run_dir, default_progress())
    console = Console()
    console.print()
    console.print(eval_summary(record))
    console.print()
    lines = [f"Scores:   {os.path.relpath(run_dir / 'scores.json')}"]
    lines.append(f"Answers:  {os.path.relpath(run_dir / 'samples')}/NAME/BENCHMARK.parquet")
    interface = ui_command(config.tracking)
    if interface is not None:
        lines.append(f"Compare:  {interface}")
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
