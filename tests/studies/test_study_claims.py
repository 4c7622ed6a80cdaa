"""The table of claims is what the committed records say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_studies import StudyRunner

from dop_search.errors import ConfigError
from dop_search.report.studies.claims import markdown
from dop_search.studies.claims import CLAIMS, collect
from dop_search.studies.results import plain

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


def test_the_committed_table_is_made_from_the_committed_records() -> None:
    rows = plain(collect(EXPERIMENTS))
    committed = json.loads((EXPERIMENTS / "claims" / "result.json").read_text())
    assert committed["rows"] == rows, "run `dop-search experiment=claims` and copy its table into the README"
    assert markdown(committed) in (EXPERIMENTS / "claims" / "README.md").read_text()
    assert [row["claim"] for row in rows] == [claim.name for claim in CLAIMS]


def test_the_study_writes_these_rows(run_small_study: StudyRunner) -> None:
    result = run_small_study("claims", f"study.options.experiments={EXPERIMENTS}")
    assert result["rows"] == plain(collect(EXPERIMENTS))


def test_a_missing_record_names_the_command_that_makes_it(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="run `dop-search experiment=compare` first"):
        collect(tmp_path)
