"""What every command does before anything is measured: threads, a device, folders, the model.

Processes on one machine take its accelerators in turn: a process holds a lock of its device as long as it runs.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from transformers.utils import logging as transformers_logging

from dop_search.app.config import EvalRunConfig, SearchConfig
from dop_search.models.loading import LoadedModel, load
from dop_search.utils.files import check_writable
from dop_search.utils.processes import hold
from dop_search.utils.progress import Progress

_MOST = 64
"""The most processes that are counted on a device."""
_held: dict[str, IO[bytes]] = {}


def begin(config: SearchConfig | EvalRunConfig, folder: Path, key: str, progress: Progress) -> LoadedModel:
    """Take the configured threads and a device, find out that the cache and ``folder``, which the user sets by ``key``,
    can be written, and load the model."""
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    check_writable(Path(config.cache_dir), "cache_dir")
    check_writable(folder, key)
    with progress.task(f"load {config.model.name_or_path}"):
        transformers_logging.disable_progress_bar()
        device = own_device(config.model.device, config.model.device_map)
        return load(**{**config.model.model_dump(), "device": device})


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
