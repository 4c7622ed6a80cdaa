"""The table of what can be pruned is what the installed transformers says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import dop_search.models
from dop_search.models.coverage import coverage, table

README = Path(dop_search.models.__file__).parent / "README.md"


@pytest.mark.slow
def test_the_readme_holds_the_table() -> None:
    assert table() in README.read_text(encoding="utf-8"), "write it anew: python -m dop_search.models.coverage"


@pytest.mark.parametrize(
    ("model_type", "status", "reason"),
    [
        ("smolvlm", "covered", ""),
        ("idefics2", "refused", "nothing but an adapter"),
        ("gemma4", "covered", "26B"),
        ("paligemma", "refused", "not causal"),
        ("lfm3_vl", "refused", r"\(conv\).*without `self_attn`"),
        ("mllama", "not applicable", "cross attention"),
    ],
)
def test_reasons(model_type: str, status: str, reason: str) -> None:
    row = coverage(model_type)
    assert row.status == status
    assert re.search(reason, row.reason)
