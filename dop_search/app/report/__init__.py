"""Tables, plots and one page from records and curves. Never imports torch."""

from dop_search.app.report.divergence_curves import divergence_curves
from dop_search.app.report.kl_plots import additive_vs_exact, pareto_front
from dop_search.app.report.layer_map import layer_map
from dop_search.app.report.table import summary
from dop_search.app.report.write import write_report

__all__ = ["additive_vs_exact", "divergence_curves", "layer_map", "pareto_front", "summary", "write_report"]
