"""Where the commands start: ``--version`` and a missing extra are answered without what the extra brings."""

from __future__ import annotations

import importlib
import sys

from dop_search import __version__
from dop_search.utils.errors import MissingExtraError
from dop_search.utils.extras import check_extras


def search() -> None:
    """``dop-search``, and ``python -m dop_search``."""
    _start("dop-search", "search", extras=("search",))


def evaluate() -> None:
    """``dop-eval``."""
    _start("dop-eval", "evaluate", extras=("search", "eval"))


def report() -> None:
    """``dop-report``."""
    _start("dop-report", "finished", extras=("search",), function="report")


def track() -> None:
    """``dop-track``."""
    _start("dop-track", "finished", extras=("search",), function="track")


def bench() -> None:
    """``dop-bench``."""
    if any(argument.partition("=")[0] == "--mlflow" for argument in sys.argv[1:]):
        _require("dop-bench: --mlflow", "search")
    _start("dop-bench", "bench", extras=())


def serve() -> None:
    """``dop-serve``."""
    _start("dop-serve", "serve", extras=())


def _start(command: str, module: str, extras: tuple[str, ...], function: str = "main") -> None:
    if "--version" in sys.argv[1:]:
        print(f"{command} {__version__}")
        return
    _require(command, *extras)
    sys.exit(getattr(importlib.import_module(f"dop_search.app.cli.{module}"), function)())


def _require(what: str, *extras: str) -> None:
    try:
        check_extras(what, *extras)
    except MissingExtraError as error:
        sys.exit(str(error))
