"""Processes on one machine take its accelerators in turn: a process holds a lock of its device as long as it runs."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch

from dop_search.utils.processes import hold

_MOST = 64
"""The most processes that are counted on a device."""
_held: dict[str, IO[bytes]] = {}


def own_device(device: str, device_map: str | None = None) -> str:
    """``auto`` as the device of this process, where there are several; any other choice as it is."""
    if device != "auto" or device_map is not None or torch.cuda.device_count() < 2:
        return device
    return take_device([str(torch.cuda.get_device_properties(i).uuid) for i in range(torch.cuda.device_count())])


def take_device(identities: Sequence[str], folder: Path | None = None) -> str:
    """The device with the fewest processes, by its place: ``cuda:0``, ``cuda:1``, …; the same for later calls.

    Args:
        identities: of the devices, the same in all processes, whichever of them these see.
        folder: where the locks are; default: the machine's for temporary files.
    """
    for place, identity in enumerate(identities):
        if identity in _held:
            return f"cuda:{place}"
    for number in range(_MOST):
        for place, identity in enumerate(identities):
            try:
                lock = hold((folder or Path(tempfile.gettempdir())) / f"dop-search-device-{identity}-{number}")
            except OSError:  # another process has it
                continue
            _held[identity] = lock
            return f"cuda:{place}"
    return "cuda:0"
