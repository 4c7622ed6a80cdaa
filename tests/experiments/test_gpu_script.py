"""What is prepared for a GPU runs, at a tiny size on a CPU: the rehearsal."""

from __future__ import annotations

import importlib.util
from argparse import Namespace
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "experiments" / "gpu" / "run.py"
OPTIONS = Namespace(shape="tiny", device="cpu", samples=2, rounds=1, memory="auto")


@pytest.fixture(scope="module")
def parts():
    spec = importlib.util.spec_from_file_location("gpu_run", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert sum(module.LIMITS.values()) <= 600
    return module.PARTS


def test_layers_can_be_captured(parts) -> None:
    """The host waits for nothing in them, and a second run gives the same."""
    rows = parts["graphs"](OPTIONS)["rows"]
    assert len(rows) >= 5
    for row in rows.values():
        assert row["same"]
        assert row["waits"] == {}


def test_attention_from_the_bottom_right_is_that_with_a_mask(parts) -> None:
    for row in parts["attention"](OPTIONS).values():
        assert row["largest_difference"] < 1e-5


def test_the_search_runs_and_its_memory_is_forecast(parts) -> None:
    found = parts["search"](OPTIONS)
    assert found["predicted_bytes"] > 0
    assert found["times_memory_ran_out"] == 0
    assert set(found["part_seconds"]) == {"teacher", "curves", "candidates", "held-out"}


@pytest.mark.slow
def test_the_command_is_timed(parts) -> None:
    assert {row["name"] for row in parts["plain"](OPTIONS)["rows"]} >= {"full model", "uniform"}
