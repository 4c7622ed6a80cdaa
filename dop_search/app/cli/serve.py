"""``dop-serve``: check that strategies can be served by vLLM, and print the command lines that do."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from dop_search.app.cli.entry import answer
from dop_search.models.loading import checkpoint_source
from dop_search.serving.servable import serve_command
from dop_search.strategy import Strategy
from dop_search.utils.errors import StrategyError


def main(arguments: Sequence[str] | None = None) -> int:
    """``dop-serve STRATEGY.json`` or ``dop-serve RUN_DIR``; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="dop-serve", description="Check that a strategy can be served by vLLM, and print the line that does."
    )
    parser.add_argument("strategy", help="a strategy's file, or the directory of a finished run for all of its own")
    parser.add_argument("--model", help="hub id or folder; by default the model that the strategy was searched on")
    return answer(parser, arguments, _serve)


def _serve(options: argparse.Namespace) -> None:
    for file in _files(options.strategy):
        print(serve_command(_model(file, options.model), file))


def _files(given: str) -> list[str]:
    if not Path(given).is_dir():
        return [given]
    files = sorted(str(path) for path in Path(given).glob("strategy-*.json"))
    if not files:
        raise StrategyError(
            f"{given!r} has no strategy-*.json; give the directory of a finished run, or a strategy's file"
        )
    return files


def _model(file: str, given: str | None) -> str:
    name = given or Strategy.load(file).provenance.get("model")
    if not isinstance(name, str):
        raise StrategyError(f"{file!r} does not say which model it was searched on; add --model")
    return checkpoint_source(name)
