"""``dop-search``: compose by Hydra, validate, run the pipeline, print the table."""

from __future__ import annotations

import os
from pathlib import Path

from omegaconf import DictConfig

from dop_search.app.cli.hydra_command import print_end, run_command
from dop_search.app.config import SearchConfig, parse_config
from dop_search.utils.conf import CONFIG_NAME
from dop_search.utils.extras import check_extras
from dop_search.utils.progress import default_progress


def main() -> None:
    """Entry point: one search, or with ``-m`` one per combination."""
    run_command("dop-search", CONFIG_NAME, run_search)


def run_search(composed: DictConfig, run_dir: Path) -> None:
    """Validate the configuration, search, and print the summary and where everything lies."""
    config = parse_config(composed)
    # Hydra's own `--help` and errors need neither torch nor mlflow, so those are imported only to run.
    from dop_search.app.tracking.connection import check_tracking, ui_command

    if config.plan:
        from dop_search.app.plan import show_plan

        show_plan(config)
        return
    check_tracking(config.tracking)
    if config.study is not None:
        _run_study(config)
        return
    if config.eval.benchmarks:
        check_extras(f"eval={config.eval.name}", "eval")
    if config.storage is not None:
        from dop_search.search.optuna_study import open_storage

        open_storage(config.storage)  # a database that cannot be opened is an error now
    from dop_search.app.report import summary
    from dop_search.app.report.scores import score_summary
    from dop_search.app.search import run
    from dop_search.app.tracking.system import system_metrics

    with system_metrics(config.tracking, run_dir):
        record = run(config, run_dir, default_progress())
    scores = score_summary(record)
    print_end(
        [summary(record)] if scores is None else [summary(record), scores],
        [
            f"Strategies, record, curves, plots: {os.path.relpath(run_dir)}",
            f"Report:   {os.path.relpath(run_dir / 'report.html')}",
        ],
        ui_command(config.tracking),
    )


def _run_study(config: SearchConfig) -> None:
    from dop_search.app.study_run import run_study
    from dop_search.app.tracking.connection import ui_command

    done = run_study(config, default_progress())
    lines = [f"Rows, figures: {os.path.relpath(done.folder)}"]
    if done.num_published:
        rows = f"{done.num_published} of {len(done.data['rows'])} rows are the published ones"
        lines.append(f"{rows}; `study.published=null study.folder=NEW` measures them again")
    print_end([] if done.table is None else [done.table], lines, ui_command(config.tracking))


if __name__ == "__main__":
    main()
