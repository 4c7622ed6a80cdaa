"""Run a command of this project inside a test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from unittest.mock import patch


def exit_status(main: Callable[[], None], *argv: str) -> int:
    """The exit status of ``main`` under a command line, the command's name first."""
    with patch.object(sys, "argv", list(argv)):
        try:
            main()
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0
