"""One HTML page with everything in it: no network, no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from dop_search.app.record import Record
from dop_search.app.report.scores import HEAD, against_uniform, score_notes, score_rows
from dop_search.app.report.study import PICTURES, study_alt_text, study_figure_name
from dop_search.app.report.style import styled
from dop_search.app.report.table import result_rows
from dop_search.app.report.text import NONE, alt_text, lead, notes, percent_text

_CAPTIONS = {
    "layer_map": (
        "What is pruned",
        "Each cell is one operation: a module of a decoder layer working on the visual tokens that enter the decoder. "
        "Text tokens keep all of theirs.",
    ),
    "pareto_front": (
        "What a budget costs",
        "Lines: the Pareto front of the additive estimate. Small marks: exact KL of the candidates on the search set. "
        "Large marks: held-out KL of what was chosen, with its 95 % interval. Hatched: the text tokens' own cost.",
    ),
    "divergence_curves": (
        "Divergence curves",
        "The KL when one parameter is reduced and all others stay at full. Marks are validation runs, lines are "
        "interpolated, bars are 95 % intervals.",
    ),
    "relative_scores": (
        "What is left on the benchmarks",
        "Per cent of the full model's score, found strategy and uniform reduction at the same FLOPs, and the mean over "
        "the benchmarks.",
    ),
    "additive_vs_exact": (
        "Additive estimate and exact KL",
        "Every candidate whose exact KL was measured. On the diagonal the sum of the curves is exact; what a search "
        "needs is that it ranks well.",
    ),
}

_COLUMNS = {
    "budget": "", "method": "", "D_A": "D_A_ratio", "D_P": "D_P_ratio", "n_v": "", "FLOPs %": "", "KV %": "",
    "KL additive": "", "KL search": "CI search", "KL held-out": "95 % CI", "acc. %": "", "against uniform": "",
    "runs": "", "seconds": "",
}  # fmt: skip
"""Column → what stands below it in small letters."""
_TEMPLATES = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)


def page(record: Record, figures: Mapping[str, Figure]) -> str:
    """The whole page as a string; figures are inlined as SVG, in the order of their captions."""
    origin = record.provenance
    return _TEMPLATES.get_template("page.html.jinja").render(
        title=f"{record.model.name}: {record.space.name}, {record.solver.name}",
        lead=" ".join(lead(record)),
        heads=_COLUMNS,
        rows=[
            (row["method"], [(row.get(name, ""), row.get(below, "")) for name, below in _COLUMNS.items()])
            for row in result_rows(record)
        ],
        notes=notes(record),
        scores=[
            (
                f"Budget {result.budget.text}: {percent_text(result.flops_ratio)} % of the FLOPs",
                [
                    ("found" if row[0] == "mean" else "", [(text, "") for text in row])
                    for row in score_rows(result.scores, result.relative_mean)
                ],
                against_uniform(result.scores),
            )
            for result in record.results
            if result.scores
        ],
        score_heads=HEAD,
        score_notes=score_notes(record),
        pictures=[
            (*about, [(alt, _svg(figures[name])) for alt, name in shown if name in figures])
            for about, shown in _pictures(record)
            if any(name in figures for _, name in shown)
        ],
        facts=_facts(record),
        config=None if origin is None else json.dumps(origin.config, indent=2),
    )


def _pictures(record: Record) -> Iterator[tuple[tuple[str, str], list[tuple[str, str]]]]:
    """Heading and caption of each section, and its pictures: what one shows in words, and its name."""
    for name, about in _CAPTIONS.items():
        yield about, [(alt_text(name, record), name)]
    studied = [item for item in record.results if item.study is not None]
    for kind, (heading, caption, _) in PICTURES.items():
        yield (heading, caption), [(study_alt_text(kind, item), study_figure_name(kind, item)) for item in studied]


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _facts(record: Record) -> dict[str, str]:
    facts = {
        "Model": f"{record.model.name} ({record.model.fingerprint})",
        "Data": f"{record.data.name}; " + ", ".join(f"{k} {v}" for k, v in record.data.fingerprints.items()),
        "Selector": f"{record.selector.name} {json.dumps(record.selector.options) if record.selector.options else ''}",
        "Space, solver": f"{record.space.name}, {record.solver.name}",
        "Validation runs": f"{record.num_validation_runs} in {record.seconds:.1f} s",
        "Stages": ", ".join(f"{name} {seconds:.1f} s" for name, seconds in record.timings.items()) or NONE,
    }
    origin = record.provenance
    if origin is not None:
        facts |= {
            "Started": origin.started_at,
            "Command": origin.command or NONE,
            "Commit": origin.git_commit or NONE,
            "Machine": origin.machine or NONE,
            "Versions": ", ".join(f"{name} {version}" for name, version in origin.versions.items()) or NONE,
        }
    return facts
