"""What every command does before anything is measured."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from dop_search.app.config import EvalRunConfig, SearchConfig
from dop_search.app.devices import own_device
from dop_search.models.loading import LoadedModel, load
from dop_search.utils.files import check_writable
from dop_search.utils.progress import Progress


def begin(config: SearchConfig | EvalRunConfig, folder: Path, key: str, progress: Progress) -> LoadedModel:
    """Take the configured threads and a device, find out that the cache and ``folder`` can be written, load the model.

    Args:
        config: of the command.
        folder: where it writes.
        key: what the user sets the folder by.
        progress: told that it loads.

    Raises:
        WriteError: naming the folder and its key.
        DopError: if the model cannot be loaded.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    check_writable(Path(config.cache_dir), "cache_dir")
    check_writable(folder, key)
    with progress.task(f"load {config.model.name_or_path}"):
        transformers_logging.disable_progress_bar()
        device = own_device(config.model.device, config.model.device_map)
        return load(**{**config.model.model_dump(), "device": device})
