"""Run the notebooks and store what they show: ``python notebooks/execute.py [NAME ...]``, by default all.

Stored are outputs as a reader sees them: text, tables and pictures. What changes from run to run is left out: what
goes to stderr, times, and everything in a picture's file but its pixels. Needs the dependency group ``notebooks``.
"""

from __future__ import annotations

import base64
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).resolve().parent
TIMEOUT_S = 600
NUMBER_TOLERANCE = {"rtol": 0.02, "atol": 1e-3}
"""Largest difference of a number in two outputs that count as the same; another processor rounds otherwise."""
PIXEL_TOLERANCE = 0.01
"""Largest mean difference of two pictures' pixels, as a share of the range from black to white."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


def execute(path: Path) -> NotebookNode:
    """The notebook at ``path`` as it looks after a run in a new kernel, in its own folder.

    Raises:
        nbclient.exceptions.CellExecutionError: if a cell fails.
    """
    notebook = nbformat.read(path, as_version=4)
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT_S,
        kernel_name="python3",
        record_timing=False,
        store_widget_state=False,
        resources={"metadata": {"path": str(path.parent)}},
    )
    client.execute(env=environment)
    for cell in code_cells(notebook):
        cell.outputs = [_without_noise(output) for output in cell.outputs if output.get("name") != "stderr"]
        cell.metadata = NotebookNode()
    kernel = notebook.metadata.kernelspec
    notebook.metadata = NotebookNode(kernelspec=kernel, language_info=NotebookNode(name="python"))
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """The cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


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
    if [part.split() for part in _NUMBER.split(one)] != [part.split() for part in _NUMBER.split(other)]:
        return False
    numbers = (np.array([float(number) for number in _NUMBER.findall(text)]) for text in (one, other))
    return bool(np.allclose(*numbers, **NUMBER_TOLERANCE))


def _same_picture(one: str, other: str) -> bool:
    first, second = (np.asarray(_decoded(text).convert("RGB"), dtype=float) for text in (one, other))
    return first.shape == second.shape and float(np.abs(first - second).mean()) <= 255 * PIXEL_TOLERANCE


def _decoded(text: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(text)))


def _without_noise(output: NotebookNode) -> NotebookNode:
    """Pictures with few colours and without the names of what drew them."""
    if "image/png" in output.get("data", {}):
        buffer = io.BytesIO()
        picture = _decoded(output.data["image/png"]).convert("RGB").quantize(64, dither=Image.Dither.NONE)
        picture.save(buffer, format="PNG", optimize=True)
        output.data["image/png"] = base64.b64encode(buffer.getvalue()).decode()
    return output


def main(names: list[str]) -> None:
    """Run notebooks by name, or all, and store them."""
    for path in [FOLDER / f"{name}.ipynb" for name in names] or sorted(FOLDER.glob("*.ipynb")):
        nbformat.write(execute(path), path)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main(sys.argv[1:])
