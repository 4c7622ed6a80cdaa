"""lmms-eval prints, logs and draws bars wherever it likes; here that goes to a file."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import IO


class _LogFile(io.TextIOBase):
    """Stands in for a standard stream. ``rich`` asks it for the stream behind it, so our own bars stay visible."""

    def __init__(self, file: IO[str], terminal: IO[str]) -> None:
        self._file = file
        self.rich_proxied_file = getattr(terminal, "rich_proxied_file", terminal)

    def write(self, text: str) -> int:
        """To the file."""
        return self._file.write(text)

    def flush(self) -> None:
        """The file."""
        self._file.flush()


class Silenced:
    """The streams that were there before."""

    def __init__(self, stdout: IO[str], stderr: IO[str]) -> None:
        self._stdout, self._stderr = stdout, stderr

    def with_output(self, callback: Callable[..., None]) -> Callable[..., None]:
        """``callback`` with the streams of before, so that what it prints is seen."""

        def call(*args: object) -> None:
            with redirect_stdout(self._stdout), redirect_stderr(self._stderr):
                callback(*args)

        return call


@contextmanager
def silenced(path: Path) -> Iterator[Silenced]:
    """Within the context what Python code prints, logs by loguru or draws goes to ``path``, which is appended to.

    Loguru's default sink writes to the standard error of the time when it was imported: it is switched off meanwhile.
    """
    from loguru import logger

    path.parent.mkdir(parents=True, exist_ok=True)
    before = Silenced(sys.stdout, sys.stderr)
    with open(path, "a", encoding="utf-8") as file:
        logger.disable("")
        try:
            with redirect_stdout(_LogFile(file, sys.stdout)), redirect_stderr(_LogFile(file, sys.stderr)):
                yield before
        finally:
            logger.enable("")
