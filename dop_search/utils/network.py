"""Whether the model and data hub can be reached, found out quickly, and working without it."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

import huggingface_hub

_TIMEOUT_S = 5.0


def hub_is_reachable() -> bool:
    """Whether the Hugging Face hub answers; taken for granted behind a proxy."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    try:
        reach(huggingface_hub.constants.ENDPOINT)
    except OSError:
        return False
    return True


def reach(url: str) -> None:
    """Connect to the server of a URL, for five seconds at most; OSError if it does not answer."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    socket.create_connection((parts.hostname or "", port), _TIMEOUT_S).close()


@contextmanager
def offline(wanted: bool) -> Iterator[None]:
    """Within the context the hub's libraries read caches only, instead of asking a hub that does not answer."""
    import datasets
    from huggingface_hub import constants

    modules: tuple[Any, ...] = (datasets.config, constants)
    before = [module.HF_HUB_OFFLINE for module in modules]
    try:
        for module in modules:
            module.HF_HUB_OFFLINE = wanted or module.HF_HUB_OFFLINE
        yield
    finally:
        for module, value in zip(modules, before, strict=True):
            module.HF_HUB_OFFLINE = value
