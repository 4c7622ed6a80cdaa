"""Notebooks are committed without outputs (pytest runs them through nbmake)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlflow
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_stripped(path: Path) -> None:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)


def opened(store: str, experiment: str | None = None) -> str:
    """The experiment that the notebook `compare_runs` chooses in a store."""
    path = next(path for path in NOTEBOOKS if path.stem == "compare_runs")
    cells = ["".join(cell["source"]) for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]]
    head = (
        cells[1]
        .replace("STORE = None", f"STORE = {store!r}")
        .replace("EXPERIMENT = None", f"EXPERIMENT = {experiment!r}")
    )
    names: dict[str, Any] = {}
    exec(head + "\n" + cells[2], names)
    return str(names["EXPERIMENT"])


def test_a_store_is_opened_whatever_its_experiment_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    store, before = f"sqlite:///{tmp_path / 'mlflow.db'}", mlflow.get_tracking_uri()
    try:
        with pytest.raises(ValueError, match=rf"no search is logged in {store}; .*dop-search tracking\.uri="):
            opened(store)
        mlflow.set_experiment("spaces")
        with mlflow.start_run():
            mlflow.log_metric("floor_ratio", 0.1)
        assert opened(store) == "spaces"
        assert "{'spaces': 1}; shown: spaces" in capsys.readouterr().out
        with pytest.raises(ValueError, match="no experiment 'dop-search' with searches; there are spaces"):
            opened(store, "dop-search")
    finally:
        mlflow.set_tracking_uri(before)
