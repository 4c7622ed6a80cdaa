"""Run the notebooks and store what they show: ``python notebooks/execute.py [NAME ...]``, by default all.

Stored are outputs as a reader sees them: text, tables and pictures. What changes from run to run is left out: what
goes to stderr, times, and everything in a picture's file but its pixels. Needs the dependency group ``notebooks``.
"""

from __future__ import annotations

import base64
import io
import os
import sys
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

FOLDER = Path(__file__).resolve().parent
TIMEOUT_S = 600


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
