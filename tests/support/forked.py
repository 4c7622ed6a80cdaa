"""Processes of a test's own that begin with all that the test has imported, to be killed or to work beside it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.context import ForkProcess
from typing import Any

import torch

FORK = multiprocessing.get_context("fork")


def forked(target: Callable[..., object], *arguments: Any) -> ForkProcess:
    """Start ``target(*arguments)`` in a process with one thread: those of this process are not in it."""
    process = FORK.Process(target=_run, args=(target, arguments))
    process.start()
    return process


def _run(target: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    target(*arguments)
