"""All pictures and the page of one run."""

from __future__ import annotations

from pathlib import Path

from matplotlib.figure import Figure

from dop_search.app.record import CURVES_FILE, Record
from dop_search.app.report.divergence_curves import divergence_curves
from dop_search.app.report.kl_plots import additive_vs_exact, pareto_front
from dop_search.app.report.layer_map import layer_map
from dop_search.app.report.page import page
from dop_search.app.report.scores import relative_scores
from dop_search.app.report.study import study_figures
from dop_search.app.report.style import save_figure
from dop_search.search.curves import Curves
from dop_search.utils.files import write_text_atomic

PLOTS_FOLDER = "plots"
PAGE_FILE = "report.html"


def figures(record: Record, curves: Curves | None, run_dir: Path | None = None) -> dict[str, Figure]:
    """Every figure that the record, and the studies in its directory, have the numbers for, by file name."""
    result = {"layer_map": layer_map(record), "pareto_front": pareto_front(record)}
    if curves is not None:
        result["divergence_curves"] = divergence_curves(curves, record.model.num_layers)
    if any(item.kl_additive is not None for item in record.all_candidates()):
        result["additive_vs_exact"] = additive_vs_exact(record)
    if any(item.scores for item in record.results):
        result["relative_scores"] = relative_scores(record)
    return result if run_dir is None else result | study_figures(record, run_dir)


def write_report(record: Record, curves: Curves | None, run_dir: Path, output: Path | None = None) -> list[Path]:
    """Write ``plots/*.png``, ``plots/*.pdf`` and ``report.html`` into the run directory, or into ``output``.

    Without ``curves`` their figure is left out. Returns the files written, the page first.
    """
    drawn = figures(record, curves, run_dir)
    folder, paths = output or run_dir, []
    for name, figure in drawn.items():
        for suffix in (".png", ".pdf"):
            paths.append(folder / PLOTS_FOLDER / f"{name}{suffix}")
            save_figure(figure, paths[-1])
    write_text_atomic(folder / PAGE_FILE, page(record, drawn))
    return [folder / PAGE_FILE, *paths]


def load_curves(run_dir: Path) -> Curves | None:
    """The curves beside a record, or ``None`` if the run has none; CacheError if the file holds no curves."""
    path = run_dir / CURVES_FILE
    return Curves.load(path) if path.exists() else None
