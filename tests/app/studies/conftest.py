"""Fixtures of the studies' tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from small_studies import StudyRunner, study_config

from dop_search.app.study import run_study
from dop_search.utils.progress import SilentProgress


@pytest.fixture
def run_small_study(tmp_path: Path) -> StudyRunner:
    """``run_small_study(name, *overrides)``: the content of ``tmp_path/out/result.json``."""

    def run(name: str, *overrides: str) -> dict[str, Any]:
        return run_study(study_config(name, tmp_path, *overrides), SilentProgress())

    return run
