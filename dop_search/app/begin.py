"""What every command does before anything is loaded or measured."""

from __future__ import annotations

from pathlib import Path

import torch

from dop_search.app.config import EvalRunConfig, SearchConfig
from dop_search.utils.files import check_writable


def begin(config: SearchConfig | EvalRunConfig, folder: Path, key: str) -> None:
    """Take the configured threads, and find out that the cache and ``folder``, named by ``key``, can be written.

    Raises:
        WriteError: naming the folder and its key.
    """
    if config.num_threads is not None:
        torch.set_num_threads(config.num_threads)
    check_writable(Path(config.cache_dir), "cache_dir")
    check_writable(folder, key)
