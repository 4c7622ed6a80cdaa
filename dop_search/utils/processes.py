"""Whether a process that has begun something still runs: a lock that the operating system releases when it ends.

Names and numbers of processes do not tell: two containers may have the same. A lock on a file that both see does.
"""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO


def hold(path: Path) -> IO[bytes]:
    """Lock a file, made if it is missing, until the returned handle is closed or this process ends in any way.

    Raises:
        OSError: if it cannot be written, or its file system has no locks.
        BlockingIOError: if somebody else holds it.
    """
    file = path.open("ab")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        raise
    return file


def is_abandoned(path: Path) -> bool:
    """Whether the file is there and nobody holds it; ``False`` also where that cannot be known."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
