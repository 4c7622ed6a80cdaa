"""Files by path, or by an address such as ``runs:/ID/strategy.json`` whose scheme an installed package can open."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path

_GROUP = "dop_search.addresses"
"""Entry points by scheme: functions that copy what an address names into a folder and return the file."""
_SCHEME = re.compile(r"([a-z][a-z\d+.-]+):/")


@contextmanager
def local_file(address: str | Path) -> Iterator[Path]:
    """The file of a path or an address, while entered; DopError if the address cannot be opened."""
    found = _SCHEME.match(str(address))
    openers = entry_points(group=_GROUP, name=found[1]) if found else ()
    if not openers:
        yield Path(address)
        return
    opener: Callable[[str, Path], Path] = next(iter(openers)).load()
    with tempfile.TemporaryDirectory() as folder:
        yield opener(str(address), Path(folder))
