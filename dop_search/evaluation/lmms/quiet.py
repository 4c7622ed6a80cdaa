"""lmms-eval prints, logs and draws bars wherever it likes; here that goes to a file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any


@contextmanager
def silenced(path: Path) -> Iterator[Callable[..., None]]:
    """Within the context what Python code prints, logs by loguru or draws goes to ``path``, which is appended to.

    Loguru's default sink writes to the standard error of the time when it was imported: it is switched off meanwhile.
    Yields what calls a function with the streams of before, so that what that prints is seen.
    """
    from loguru import logger

    path.parent.mkdir(parents=True, exist_ok=True)
    stdout, stderr = sys.stdout, sys.stderr

    def seen(callback: Callable[..., None], *args: object) -> None:
        with redirect_stdout(stdout), redirect_stderr(stderr):
            callback(*args)

    with ExitStack() as stack:
        for redirect, terminal in ((redirect_stdout, sys.stdout), (redirect_stderr, sys.stderr)):
            file: Any = stack.enter_context(open(path, "a", encoding="utf-8", buffering=1))
            # `rich` asks a standard stream for the one behind it, so our own bars stay visible.
            file.rich_proxied_file = getattr(terminal, "rich_proxied_file", terminal)
            stack.enter_context(redirect(file))
        logger.disable("")
        stack.callback(logger.enable, "")
        yield seen
