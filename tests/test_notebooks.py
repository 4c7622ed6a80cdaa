"""Notebooks show what a run of them shows, use what users may import, and hold nothing of the machine that ran them."""

from __future__ import annotations

import ast
import base64
import importlib.util
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pytest
from PIL import Image

import dop_search as dop

TESTS = Path(__file__).parent
FOLDER = TESTS.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
IMPORTS = {"dop_search", "matplotlib", "mlflow", "pandas", *sys.stdlib_module_names}

NUMBER_TOLERANCE = {"rtol": 0.02, "atol": 1e-3}
"""Largest difference of a number in two outputs that count as the same; another processor rounds otherwise."""
PIXEL_TOLERANCE = 0.01
"""Largest mean difference of two pictures' pixels, as a share of the range from black to white."""

NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")

of_each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@pytest.fixture(scope="module")
def execution() -> Any:
    """The module that runs notebooks and compares outputs."""
    spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(path: Path) -> list[Any]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def same_output(one: Any, other: Any) -> bool:
    """Whether two outputs show the same: text up to ``NUMBER_TOLERANCE``, pictures up to ``PIXEL_TOLERANCE``."""
    parts = _parts(one), _parts(other)
    if parts[0].keys() != parts[1].keys():
        return False
    return all(
        (_same_picture if kind == "image/png" else _same_text)(content, parts[1][kind])
        for kind, content in parts[0].items()
    )


def _parts(output: Any) -> dict[str, str]:
    """What an output holds, by kind."""
    return {"text/plain": output["text"]} if output["output_type"] == "stream" else dict(output["data"])


def _same_text(one: str, other: str) -> bool:
    if [part.split() for part in NUMBER.split(one)] != [part.split() for part in NUMBER.split(other)]:
        return False
    numbers = (np.array([float(number) for number in NUMBER.findall(text)]) for text in (one, other))
    return bool(np.allclose(*numbers, **NUMBER_TOLERANCE))


def _same_picture(one: str, other: str) -> bool:
    first, second = (
        np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"), dtype=float) for text in (one, other)
    )
    return first.shape == second.shape and float(np.abs(first - second).mean()) <= 255 * PIXEL_TOLERANCE


@pytest.mark.slow
@of_each_notebook
def test_a_run_shows_what_is_stored(path: Path, execution: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If not, ``python notebooks/execute.py NAME`` stores what it shows now; pictures of commands are not shown."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(map(str, (TESTS, TESTS / "support" / "undrawn_commands"))))
    for stored, cell in zip(code_cells(path), execution.code_cells(execution.execute(path)), strict=True):
        assert stored["execution_count"] == cell.execution_count
        shown = [output["output_type"] for output in cell.outputs]
        assert [output["output_type"] for output in stored["outputs"]] == shown
        for before, after in zip(stored["outputs"], cell.outputs, strict=True):
            assert same_output(before, after), (before, after)


@of_each_notebook
def test_outputs_are_there_and_say_nothing_of_the_machine(path: Path) -> None:
    cells = code_cells(path)
    assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
    for cell in cells:
        assert cell["execution_count"] is not None
        assert cell["metadata"] == {}
        for output in cell["outputs"]:
            assert output.get("name") != "stderr"
            text = output.get("text", "") + output.get("data", {}).get("text/plain", "")
            assert not re.search(r"(?<![\w.:/])/[A-Za-z]\w*/|0x[0-9a-f]{6,}|\d\d:\d\d:\d\d", text), text
    assert path.stat().st_size < 300 * 1024


@of_each_notebook
def test_only_public_names_are_used(path: Path) -> None:
    for cell in code_cells(path):
        for node in ast.walk(ast.parse(cell["source"])):
            if isinstance(node, ast.Import):
                names = [item.name for item in node.names]
                assert not [name for name in names if name.startswith("dop_search.")]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module)]
                assert not names[0].startswith("dop_search")
            else:
                names = []
                if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "dop":
                    assert node.attr in dop.__all__
            assert {name.split(".")[0] for name in names} <= IMPORTS


def picture(value: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), value).save(buffer, format="PNG")
    return {"output_type": "display_data", "data": {"image/png": base64.b64encode(buffer.getvalue()).decode()}}


def printed(text: str) -> dict[str, Any]:
    return {"output_type": "stream", "name": "stdout", "text": text}


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (printed("KL 0.1000 nats\n"), printed("KL 0.1001  nats"), True),
        (printed("KL 0.1000 nats"), printed("KL 0.1100 nats"), False),
        (printed("KL 0.1 nats"), printed("KL 0.1 bits"), False),
        (printed("1 2"), printed("1"), False),
        (printed("100"), picture(100), False),
        (picture(100), picture(101), True),
        (picture(100), picture(120), False),
    ],
)
def test_outputs_are_compared_by_what_they_show(one: dict[str, Any], other: dict[str, Any], same: bool) -> None:
    assert same_output(one, other) is same


def opened(store: str, experiment: str | None = None) -> str:
    """The experiment that the notebook `compare_runs` chooses in a store."""
    sources = [cell["source"] for cell in code_cells(FOLDER / "compare_runs.ipynb")]
    given = (("STORE", store), ("EXPERIMENT", experiment))
    head = sources[0]
    for name, value in given:
        assert f"{name} = None" in head
        head = head.replace(f"{name} = None", f"{name} = {value!r}")
    names: dict[str, Any] = {}
    exec(head + "\n" + sources[1], names)
    return str(names["EXPERIMENT"])


@pytest.mark.slow
def test_a_store_is_opened_whatever_its_experiment_is_called(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

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
