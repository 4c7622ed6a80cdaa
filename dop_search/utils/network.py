"""Whether the model and data hub can be reached, found out quickly."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlsplit

import huggingface_hub


def hub_is_reachable(timeout_s: float = 5.0) -> bool:
    """Whether the Hugging Face hub answers; taken for granted behind a proxy."""
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    port = endpoint.port or (443 if endpoint.scheme == "https" else 80)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout_s).close()
    except OSError:
        return False
    return True
