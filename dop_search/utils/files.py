"""Files that are there in full or not at all, and disks that are full or read-only: one sentence, and early."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from dop_search.utils.errors import WriteError
from dop_search.utils.processes import hold, is_abandoned

_TEMPORARY = re.compile(r"\..+~(?P<host>[^~]+):\d+~\w+(\.\w+)?")
"""Name of a temporary file: it says which process writes it, and that holds it."""
_PROBE_BYTES = 1 << 20
_FORGOTTEN_S = 24 * 3600.0


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then move it there in one step.

    Raises:
        WriteError: if the file cannot be written; nothing is left of it then.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        prefix = f".{path.name}~{socket.gethostname()}:{os.getpid()}~"
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=path.suffix)
        os.close(handle)
        temporary = Path(name)
        with contextlib.ExitStack() as held:
            held.callback(temporary.unlink, missing_ok=True)
            with contextlib.suppress(OSError):  # a file system without locks
                held.enter_context(hold(temporary))
            write(temporary)
            temporary.chmod(0o644)
            temporary.replace(path)
    except OSError as error:
        raise cannot_write(path, error) from error


def write_text_atomic(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, atomically."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def cannot_write(path: Path, error: OSError) -> WriteError:
    """The error of a file that cannot be written: what is safe, and how to go on."""
    return WriteError(
        f"cannot write {str(path)!r}: {error.strerror or error}; what was saved before is whole. Free space, or choose "
        "a folder that can be written, and run the same command again: with the same cache_dir it continues there"
    )


def check_writable(folder: Path, key: str) -> None:
    """Find out before anything expensive whether a folder can be written; sweep what killed writers left there.

    Args:
        folder: made if it is not there.
        key: what the user sets it by.

    Raises:
        WriteError: naming the key and the folder.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_PROBE_BYTES))
            file.flush()
        sweep(folder)
    except OSError as error:
        raise WriteError(
            f"{key}={str(folder)!r} cannot be written: {error.strerror or error}; free space, or set {key} to a folder "
            "that can be written; nothing has been computed yet"
        ) from error


def sweep(folder: Path) -> None:
    """Delete temporary files whose writers on this machine are dead, and those of a day ago from elsewhere."""
    for path in folder.iterdir():
        found = _TEMPORARY.fullmatch(path.name)
        if found is None:
            continue
        with contextlib.suppress(FileNotFoundError):  # another process sweeps, or its writer is done
            is_dead = found["host"] == socket.gethostname() and is_abandoned(path)
            if is_dead or time.time() - path.stat().st_mtime > _FORGOTTEN_S:
                path.unlink()
