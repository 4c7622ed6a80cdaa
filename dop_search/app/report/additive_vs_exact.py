"""How well the additive estimate orders strategies: estimate against exact KL, with Spearman's rho."""

from __future__ import annotations

from matplotlib.figure import Figure

from dop_search.app.record import Candidate, Record
from dop_search.app.report.style import FAINT, FOUND, INK, SMALLEST_KL, UNIFORM, styled
from dop_search.utils.statistics import spearman


def rank_correlation(candidates: list[Candidate]) -> tuple[float, int] | None:
    """Spearman's rho of additive and exact KL, and the number of pairs; ``None`` if there is nothing to rank."""
    pairs = [(item.kl_additive, item.kl_search) for item in candidates if item.kl_additive is not None]
    additive, exact = [a for a, _ in pairs], [e for _, e in pairs]
    if len(pairs) < 3 or len(set(additive)) == 1 or len(set(exact)) == 1:
        return None
    return spearman(additive, exact), len(pairs)


def additive_vs_exact(record: Record) -> Figure:
    """A scatter of all measured candidates on logarithmic axes; on the diagonal the estimate is exact."""
    candidates = [item for item in record.all_candidates() if item.kl_additive is not None]
    shown = [item for item in candidates if min(item.kl_search, item.kl_additive or 0.0) > SMALLEST_KL]
    with styled():
        figure = Figure(figsize=(4.6, 4.4), layout="constrained")
        axis = figure.subplots()
        for is_uniform, color, marker, label in (
            (False, FOUND, "o", "candidate"),
            (True, UNIFORM, "s", "uniform reduction"),
        ):
            chosen = [item for item in shown if item.is_uniform == is_uniform]
            if chosen:
                axis.plot(
                    [item.kl_additive or 0.0 for item in chosen],
                    [item.kl_search for item in chosen],
                    marker,
                    color=color,
                    markerfacecolor=color if is_uniform else "none",
                    markersize=4.5,
                    linestyle="",
                    label=label,
                )
        results = [(r.kl_additive, r.kl_search) for r in record.results if r.kl_additive and r.kl_search > 0.0]
        if results:
            additive, exact = zip(*results, strict=True)
            axis.plot(
                additive, exact, "*", color=INK, markersize=11, markeredgecolor="white", linestyle="", label="found"
            )
        axis.set_xscale("log")
        axis.set_yscale("log")
        low = min([*axis.get_xlim(), *axis.get_ylim()])
        high = max([*axis.get_xlim(), *axis.get_ylim()])
        axis.plot([low, high], [low, high], color=FAINT, linewidth=0.9, zorder=0)
        axis.set_xlim(low, high)
        axis.set_ylim(low, high)
        axis.set_aspect("equal")
        axis.set_xlabel("additive estimate (nats)")
        axis.set_ylabel("exact KL on the search set (nats)")
        axis.set_title("Does the sum rank strategies?")
        rho = rank_correlation(candidates)
        if rho is not None:
            axis.annotate(
                f"Spearman ρ = {rho[0]:.3f}  (n = {rho[1]})",
                (0.02, -0.16),
                xycoords="axes fraction",
                ha="left",
                color=INK,
            )
        if shown or results:
            axis.legend(loc="upper left")
    return figure
