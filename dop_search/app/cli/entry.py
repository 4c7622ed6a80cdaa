"""Where the commands start: ``--version`` and a missing extra are answered without what the extra brings."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial

from dop_search import __version__
from dop_search.utils.errors import DopError, MissingExtraError
from dop_search.utils.extras import check_extras


def _start(command: str, module: str, *extras: str, function: str = "main") -> None:
    if "--version" in sys.argv[1:]:
        print(f"{command} {__version__}")
        return
    try:
        check_extras(command, *extras)
    except MissingExtraError as error:
        sys.exit(str(error))
    sys.exit(getattr(importlib.import_module(f"dop_search.app.cli.{module}"), function)())


def answer(
    parser: argparse.ArgumentParser, arguments: Sequence[str] | None, job: Callable[[argparse.Namespace], None]
) -> int:
    """Do a job with the parsed arguments; the exit status, 1 on a user's error, which is shown without a traceback."""
    options = parser.parse_args(arguments)
    try:
        job(options)
    except DopError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    return 0


search = partial(_start, "dop-search", "search", "search")  # and ``python -m dop_search``
evaluate = partial(_start, "dop-eval", "evaluate", "search", "eval")
report = partial(_start, "dop-report", "finished", "search", function="report")
track = partial(_start, "dop-track", "finished", "search", function="track")
bench = partial(_start, "dop-bench", "bench")
serve = partial(_start, "dop-serve", "serve")
