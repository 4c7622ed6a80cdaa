"""One HTML page with everything in it: no network, no other file."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from dop_search.app.record import Record, Result
from dop_search.app.report.scores import HEAD, against_uniform, score_notes, score_rows
from dop_search.app.report.study import KINDS, captions, study_alt_text
from dop_search.app.report.style import styled
from dop_search.app.report.text import (
    NONE,
    alt_text,
    interval_text,
    kl_text,
    lead,
    notes,
    percent_text,
    policy_text,
    verdict,
)

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

_CSS = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def page(record: Record, figures: Mapping[str, Figure]) -> str:
    """The whole page as a string; figures are inlined as SVG, in the order of their captions."""
    title = f"{record.model.name}: {record.space.name}, {record.solver.name}"
    parts = [
        f"<header><p class=kicker>Operation pruning</p><h1>{escape(title)}</h1>{_lead(record)}</header>",
        "<section><h2>Results</h2>",
        _table(record),
        f"<ul class=notes>{''.join(f'<li>{escape(note)}</li>' for note in notes(record))}</ul></section>",
    ]
    parts += _scores(record)
    for name, (heading, caption) in _CAPTIONS.items():
        if name in figures:
            parts.append(_section(heading, caption, [(alt_text(name, record), figures[name])]))
    for kind in KINDS:
        shown = [
            (study_alt_text(kind, result), figures[name])
            for result in record.results
            if (name := f"study_{kind}-{result.budget.text.replace(' ', '-')}") in figures
        ]
        if shown:
            parts.append(_section(*captions(kind), shown))
    parts.append(_provenance(record))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>'
        f"<style>{_CSS}</style></head>\n<body><main>\n" + "\n".join(parts) + "\n</main></body></html>\n"
    )


def _section(heading: str, caption: str, shown: Sequence[tuple[str, Figure]]) -> str:
    images = "".join(
        f'<div class=scroll><img alt="{escape(alt)}" src="data:image/svg+xml;base64,{_svg(figure)}"></div>'
        for alt, figure in shown
    )
    return f"<section><h2>{heading}</h2><figure>{images}<figcaption>{caption}</figcaption></figure></section>"


def _lead(record: Record) -> str:
    return f"<p class=lead>{escape(' '.join(lead(record)))}</p>"


def _table(record: Record) -> str:
    head = (
        "budget", "method", "D<sub>A</sub>", "D<sub>P</sub>", "n<sub>v</sub>", "FLOPs %", "KV %", "KL additive",
        "KL search", "KL held-out", "accuracy %", "against uniform", "runs", "seconds",
    )  # fmt: skip
    rows = "".join(_rows(result) for result in record.results)
    cells = "".join(f"<th scope=col>{name}</th>" for name in head)
    return f"<div class=scroll><table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table></div>"


def _rows(result: Result) -> str:
    policy, uniform = policy_text(result.strategy), result.uniform
    found = [
        _cell([result.budget.text]),
        _cell(["found"]),
        _cell(policy.attention, policy.attention_ratio),
        _cell(policy.mlp, policy.mlp_ratio),
        _cell([policy.num_visual_tokens]),
        _cell([percent_text(result.flops_ratio)]),
        _cell([percent_text(result.kv_ratio)]),
        _cell([kl_text(result.kl_additive)]),
        _cell([kl_text(result.kl_search)], [interval_text(result.kl_search_ci95)]),
        _cell([kl_text(result.kl_heldout)], [interval_text(result.kl_heldout_ci95)]),
        _cell([percent_text(result.accuracy_pruned)]),
        _cell([verdict(result)]),
        _cell([str(result.num_validation_runs)]),
        _cell([f"{result.seconds:.1f}"]),
    ]
    row = f"<tr class=found>{''.join(found)}</tr>"
    if uniform is None:
        return row
    reduced = [
        _cell([""]),
        _cell(["uniform"]),
        _cell(["all"]),
        _cell(["all"]),
        _cell([str(uniform.num_visual_tokens)]),
        _cell([percent_text(uniform.flops_ratio)]),
        _cell([percent_text(uniform.kv_ratio)]),
        _cell([kl_text(uniform.kl_additive)]),
        _cell([kl_text(uniform.kl_search)]),
        _cell([kl_text(uniform.kl_heldout)], [interval_text(uniform.kl_heldout_ci95)]),
        _cell([percent_text(uniform.accuracy)]),
        *(_cell([""]) for _ in range(3)),
    ]
    return f"{row}<tr class=uniform>{''.join(reduced)}</tr>"


def _scores(record: Record) -> list[str]:
    """A table of benchmark scores per budget, where a suite ran."""
    tables = []
    for result in record.results:
        if result.scores:
            head = "".join(f"<th scope=col>{escape(name)}</th>" for name in HEAD)
            rows = "".join(
                f"<tr{' class=found' if row[0] == 'mean' else ''}>{''.join(_cell([text]) for text in row)}</tr>"
                for row in score_rows(result.scores, result.relative_mean)
            )
            title = f"Budget {escape(result.budget.text)}: {percent_text(result.flops_ratio)} % of the FLOPs"
            tables.append(
                f"<h3>{title}</h3><div class=scroll><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>"
                "</div>" + "".join(f"<p>{escape(line)}</p>" for line in against_uniform(result.scores))
            )
    if not tables:
        return []
    listed = "".join(f"<li>{escape(note)}</li>" for note in score_notes(record))
    return [f"<section><h2>Benchmarks</h2>{''.join(tables)}<ul class=notes>{listed}</ul></section>"]


def _cell(lines: Sequence[str], below: Sequence[str] = ()) -> str:
    small = "".join(f"<small>{escape(line)}</small>" for line in below if line != NONE)
    return f"<td>{'<br>'.join(escape(line) for line in lines)}{small}</td>"


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    with styled():
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _provenance(record: Record) -> str:
    facts: dict[str, str] = {
        "Model": f"{record.model.name} ({record.model.fingerprint})",
        "Data": f"{record.data.name}; " + ", ".join(f"{k} {v}" for k, v in record.data.fingerprints.items()),
        "Selector": f"{record.selector.name} {json.dumps(record.selector.options) if record.selector.options else ''}",
        "Space, solver": f"{record.space.name}, {record.solver.name}",
        "Validation runs": f"{record.num_validation_runs} in {record.seconds:.1f} s",
        "Stages": ", ".join(f"{name} {seconds:.1f} s" for name, seconds in record.timings.items()) or NONE,
    }
    config = ""
    origin = record.provenance
    if origin is not None:
        facts |= {
            "Started": origin.started_at,
            "Command": origin.command or NONE,
            "Commit": origin.git_commit or NONE,
            "Machine": origin.machine or NONE,
            "Versions": ", ".join(f"{name} {version}" for name, version in origin.versions.items()) or NONE,
        }
        tree = escape(json.dumps(origin.config, indent=2))
        config = f"<details><summary>Configuration</summary><pre>{tree}</pre></details>"
    rows = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<section><h2>Provenance</h2><dl>{rows}</dl>{config}</section>"
