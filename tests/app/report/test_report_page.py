"""The files of a report: complete, self-contained, the same again."""

from __future__ import annotations

import base64
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from support.records import example_curves, example_record

from dop_search.app.cli.finished import report as main
from dop_search.app.record import CURVES_FILE, RECORD_FILE, Named
from dop_search.app.report.page import page
from dop_search.app.report.text import lead, verdict
from dop_search.app.report.write import figures

VOID = {"meta", "img", "br"}


@pytest.mark.parametrize(
    ("intervals", "start", "others"),
    [
        ([(-0.3, -0.1)] * 3, "At 14.8 % of the prefill FLOPs", "The same holds at 29.8 %, 49.8 %."),
        (
            [(-0.3, -0.1), (-0.3, -0.1), (-0.3, 0.1)],
            "At 29.8 % of the prefill FLOPs",
            "The same holds at 49.8 %. At 14.8 %: no significant difference from uniform token reduction.",
        ),
        ([(-0.1, 0.1)] * 3, "At 14.8 % of the prefill FLOPs", "The same holds"),
        ([(0.1, 0.2), None, (-0.1, 0.1)], "At 49.8 % of the prefill FLOPs", "the difference was not tested"),
    ],
)
def test_the_lead_is_about_what_was_found_and_how_sure_it_is(
    intervals: list[tuple[float, float] | None], start: str, others: str
) -> None:
    record = example_record()
    changed = zip(record.results, intervals, strict=True)
    results = [item.model_copy(update={"kl_heldout_difference_ci95": interval}) for item, interval in changed]
    text = " ".join(lead(record.model_copy(update={"results": results})))
    assert text.startswith(start)
    assert others in text
    first = text.split(").")[0]
    sure = {"better": "significantly closer", "worse": "significantly farther", "no difference": "no significant"}
    verdicts = [verdict(item) for item in results]
    assert next(sure[word] for word in sure if word in verdicts) in first
    assert "95 % interval of the difference" in first


class Checker(HTMLParser):
    """Collects links and text, and insists that tags close in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.links: list[str] = []
        self.alts: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.alts += [value or "" for name, value in attrs if name == "alt"]
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    example_record().save(folder / RECORD_FILE)
    example_curves().save(folder / CURVES_FILE)
    return folder


@pytest.mark.slow
@pytest.mark.drawn
def test_the_command_writes_every_figure_and_a_self_contained_page(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(run_dir)]) == 0
    assert "report.html" in capsys.readouterr().out
    names = {"layer_map", "pareto_front", "divergence_curves", "additive_vs_exact"}
    for suffix, magic in ((".png", b"\x89PNG"), (".pdf", b"%PDF")):
        for name in names:
            assert (run_dir / "plots" / f"{name}{suffix}").read_bytes().startswith(magic)
    assert len(list((run_dir / "plots").iterdir())) == 2 * len(names)
    html = (run_dir / "report.html").read_text(encoding="utf-8")
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert len(checker.links) == len(names)
    said = " ".join(checker.alts)
    assert len(set(checker.alts)) == len(names)
    assert all(fact in said for fact in ("q≤3 kv≤8 mlp≤2 n_v=72", "14.8 % of the FLOPs, 0.0317", "12 layers"))
    for link in checker.links:
        kind, data = link.split(",", 1)
        assert kind == "data:image/svg+xml;base64"
        assert b"<svg" in base64.b64decode(data)
    assert not re.search(r"@import|url\(|<script|<link", html)
    text = " ".join(checker.text)
    for fact in ("llava-1f2e3d4c5b6a", "0123456789abcdef", "dop-search", "2026-01-02", "0.0317", "93.8"):
        assert fact in text


@pytest.mark.slow
@pytest.mark.drawn
def test_the_same_record_gives_the_same_page() -> None:
    record = example_record()
    assert page(record, figures(record, example_curves())) == page(record, figures(record, example_curves()))


def test_names_from_outside_are_escaped() -> None:
    record = example_record().model_copy(update={"space": Named(name="<script>alert(1)</script>")})
    assert "<script>" not in page(record, {})


def test_without_curves_their_figure_is_left_out() -> None:
    assert set(figures(example_record(), None)) == {"layer_map", "pareto_front", "additive_vs_exact"}


@pytest.mark.parametrize("content", [None, "{}", "no json"])
def test_a_run_without_a_valid_record_fails_with_a_message(
    content: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / RECORD_FILE).write_text(content)
    assert main([str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("dop-report: ")
    assert not (tmp_path / "report.html").exists()


def test_foreign_curves_fail_with_a_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    example_record().save(tmp_path / RECORD_FILE)
    (tmp_path / CURVES_FILE).write_text("not parquet")
    assert main([str(tmp_path)]) == 1
    assert CURVES_FILE in capsys.readouterr().err


@pytest.mark.slow
def test_reports_need_no_torch() -> None:
    code = (
        "import sys, dop_search.app.cli.finished; sys.exit(any(m in sys.modules for m in ('torch', 'mlflow', 'hydra')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
