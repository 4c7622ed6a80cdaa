"""What is being done and how far it is: bars on a terminal, plain lines elsewhere, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import IO, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichBars

Advance = Callable[..., None]
"""``advance()`` or ``advance(n)``: so many more steps are done."""


def _nothing(steps: int = 1) -> None:
    """An advance that nobody sees."""


class Progress:
    """Reports tasks, which can be nested; this one says nothing.

    ::

        with progress.task("curve: mlp depth", total=9) as advance:
            for level in levels:
                measure(level)
                advance()
    """

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """Something that takes a while, in ``total`` steps if their number is known."""
        yield _nothing


class PlainProgress(Progress):
    """One line when a task ends, with its seconds, and one every ``interval_s`` while it runs; for logs."""

    def __init__(self, stream: IO[str], interval_s: float = 10.0) -> None:
        self._stream = stream
        self._interval_s = interval_s
        self._start = time.monotonic()

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """Report the task when it ends, also by an exception, and now and then before."""
        start = last = time.monotonic()
        done = 0

        def say(end: str = "") -> None:
            steps = "" if total is None and not done else f" {done}/{'?' if total is None else total}"
            now = f"[{time.monotonic() - self._start:6.1f} s]"
            print(f"{now} {description}{steps}{end}", file=self._stream, flush=True)

        def advance(steps: int = 1) -> None:
            nonlocal done, last
            done += steps
            if time.monotonic() - last >= self._interval_s:
                last = time.monotonic()
                say()

        ended = "stopped after"
        try:
            yield advance
            ended = "in"
        finally:
            say(f" {ended} {time.monotonic() - start:.1f} s")


class BarProgress(Progress):
    """Bars on a terminal; a finished task leaves one line."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: RichBars | None = None

    @contextmanager
    def task(self, description: str, total: int | None = None) -> Iterator[Advance]:
        """A bar while the task runs, a line with its seconds when it is done."""
        outermost = self._bars is None
        bars = self._bars or RichBars(
            SpinnerColumn(),
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
        )
        if outermost:
            self._bars = bars
            bars.start()
        identifier = bars.add_task(description, total=total)
        start = time.monotonic()
        try:
            yield lambda steps=1: bars.advance(identifier, steps)
        finally:
            bars.remove_task(identifier)
            if outermost:
                bars.stop()
                self._bars = None
        self._console.print(
            f"[green]✓[/green] {escape(description)} [dim]{time.monotonic() - start:.1f} s[/dim]", highlight=False
        )


def default_progress(console: Console | None = None) -> Progress:
    """Bars if ``console`` (default: standard error) is a terminal, plain lines if it is not."""
    console = console or Console(stderr=True)
    return BarProgress(console) if console.is_terminal else PlainProgress(console.file)


class Notify(Protocol):
    """Told how far things are."""

    def __call__(self, done: int, total: int | None, what: str) -> None:
        """So many steps of ``what`` are done; ``None``: nobody knows of how many."""


@contextmanager
def watch(progress: Progress, prefix: str = "") -> Iterator[Notify]:
    """Turns callbacks into tasks: one per ``what``, from its first call to the next task or the end of the context."""
    current: str | None = None
    so_far = 0
    advance: Advance = _nothing
    with ExitStack() as task:

        def notify(done: int, total: int | None, what: str) -> None:
            nonlocal advance, current, so_far
            if what != current:
                task.close()
                advance = task.enter_context(progress.task(prefix + what, total))
                current, so_far = what, 0
            if done > so_far:
                advance(done - so_far)
                so_far = done

        yield notify
