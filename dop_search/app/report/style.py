"""One look for all plots: legible without colour, the same in PNG, PDF and on the page."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from dop_search.utils.files import write_atomic

_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9.0,
    "axes.titlesize": 10.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5.0,
    "hatch.linewidth": 0.7,
    "hatch.color": "#555555",
    "savefig.dpi": 160,
    "pdf.fonttype": 42,
    "svg.fonttype": "path",
    "svg.hashsalt": "dop-search",
}

INK = "#1a1a1a"
FAINT = "#8a8a8a"
SMALLEST_KL = 1e-7
"""Below this, a KL in nats is rounding; logarithmic axes leave it out."""

FOUND = "#0b4f8a"
UNIFORM = "#d1671b"


@dataclass(frozen=True)
class Look:
    """Colour, marker and line of one series: any two differ in more than colour."""

    color: str
    marker: str
    line: str | tuple[int, tuple[float, ...]]


LOOKS = (
    Look("#0b4f8a", "o", "-"),
    Look("#d1671b", "s", "--"),
    Look("#1b8a6b", "^", "-."),
    Look("#7a3b8f", "D", ":"),
    Look("#1a1a1a", "v", (0, (5, 1, 1, 1, 1, 1))),
    Look("#a08a00", "P", (0, (1, 1))),
)


@contextmanager
def styled() -> Iterator[None]:
    """Draw and save with the style of this package, whatever matplotlib is set to outside."""
    with matplotlib.rc_context(_RC):
        yield


def plain_decades(axis: Axis) -> None:
    """Label a logarithmic axis at 1, 2 and 5 times the powers of ten; matplotlib's own minor labels overlap."""
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure in the format of the suffix, atomically and without a date (same input, same bytes).

    The first format lays the figure out for all: that takes as long as drawing it.
    """
    metadata = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}.get(path.suffix)
    with styled():
        write_atomic(path, lambda temporary: figure.savefig(temporary, metadata=metadata))
    figure.set_layout_engine("none")
