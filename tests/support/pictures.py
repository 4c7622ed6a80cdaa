"""Figures that are made but not rendered: rendering takes longer than a small search. For the conftest of a folder."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

WITH_SUPPORT = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
"""The environment of a process that imports from here, for instance :data:`UNDRAWN`."""

UNDRAWN = "imports=[support.without_pictures]"
"""The same for a command."""


@pytest.fixture(autouse=True)
def unrendered(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Picture files are empty, except in tests marked ``drawn`` and in fixtures of a wider scope."""
    if request.node.get_closest_marker("drawn") is None:
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save_nothing)


def save_nothing(figure: Any, target: Any, **options: Any) -> None:
    """In the place of ``Figure.savefig``."""
    if isinstance(target, (str, Path)):
        Path(target).touch()
    else:
        target.write(b"")
