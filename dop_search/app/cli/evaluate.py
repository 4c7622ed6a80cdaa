"""``dop-eval``: score a full model and its pruned versions on a suite of benchmarks; composed by Hydra."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig

from dop_search.app.cli.hydra_command import print_end, run_command
from dop_search.app.config import EvalRunConfig, parse_as
from dop_search.utils.progress import default_progress

EVAL_CONFIG_NAME = "eval_config"
"""The primary config: ``conf/eval_config.yaml``."""


def main() -> None:
    """Entry point."""
    run_command("dop-eval", EVAL_CONFIG_NAME, run_evaluation)


def run_evaluation(composed: DictConfig, run_dir: Path) -> None:
    """Validate the configuration, score, and print the tables and where everything lies."""
    config = parse_as(composed, EvalRunConfig)
    from dop_search.app.tracking.connection import check_tracking, ui_command

    check_tracking(config.tracking)
    from dop_search.app.evaluate import evaluate
    from dop_search.app.report.scores import eval_summary

    record = evaluate(config, run_dir, default_progress())
    print_end(
        [eval_summary(record)],
        [
            f"Scores:   {os.path.relpath(run_dir / 'scores.json')}",
            f"Answers:  {os.path.relpath(run_dir / 'samples')}/NAME/BENCHMARK.parquet",
        ],
        ui_command(config.tracking),
    )


if __name__ == "__main__":
    main()
