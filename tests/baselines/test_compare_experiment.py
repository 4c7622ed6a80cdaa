"""experiments/compare on a handful of samples: rows, reasons, and a rerun that measures nothing."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "compare" / "run.py"


def test_rows_reasons_and_a_rerun_that_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "result.json"
    sizes = ("--num-search", "4", "--num-heldout", "4", "--num-test", "4", "--budgets", "0.15")
    places = ("--out", str(out), "--cache-dir", str(tmp_path / "cache"))
    methods = ("dop@uniform_grid", "uniform_grid", "fastv", "trim")
    monkeypatch.setattr(sys, "argv", ["run.py", *sizes, *places, "--methods", *methods])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    first = out.read_text()
    rows = {row["method"]: row for row in json.loads(first)["rows"]}
    assert tuple(rows) == methods
    for method in methods[:2]:
        assert rows[method]["flops_ratio"] <= 0.15 * 1.01
        assert rows[method]["kl_heldout"] > 0.0
    assert "cannot go below" in rows["fastv"]["infeasible"]
    assert "text encoder" in rows["trim"]["infeasible"]
    runpy.run_path(str(SCRIPT), run_name="__main__")
    assert out.read_text() == first
