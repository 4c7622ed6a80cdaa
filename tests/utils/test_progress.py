"""Progress reports what was done, on a terminal, in a log, and for callbacks."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from dop_search.utils.progress import BarProgress, PlainProgress, Progress, default_progress, watch


def run_tasks(progress: Progress) -> None:
    with progress.task("outer", total=1) as outer:
        with progress.task("curve [mlp]", total=5) as advance:
            advance()
            advance(4)
        outer()


def test_plain_lines_name_the_steps_and_the_time() -> None:
    stream = io.StringIO()
    run_tasks(PlainProgress(stream))
    lines = [line.split("] ", 1)[1] for line in stream.getvalue().splitlines()]
    assert [line.rsplit(" in ", 1)[0] for line in lines] == ["curve [mlp] 5/5", "outer 1/1"]


def test_plain_reports_while_a_long_task_runs() -> None:
    stream = io.StringIO()
    with PlainProgress(stream, interval_s=0.0).task("long", total=2) as advance:
        advance()
    assert "long 1/2\n" in stream.getvalue()


def test_a_failed_task_is_not_reported_as_done() -> None:
    for progress, stream in _both():
        with pytest.raises(KeyError), progress.task("doomed", total=3):
            raise KeyError("x")
        assert "✓" not in stream.getvalue()
        assert "3/3" not in stream.getvalue()


def test_bars_leave_one_line_per_task_and_can_be_reused() -> None:
    stream = io.StringIO()
    progress = BarProgress(Console(file=stream, force_terminal=True, width=80, no_color=True))
    run_tasks(progress)
    run_tasks(progress)
    text = stream.getvalue()
    assert text.count("✓") == 4


def test_silent_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    run_tasks(Progress())
    assert capfd.readouterr() == ("", "")


def test_default_is_plain_away_from_a_terminal() -> None:
    assert isinstance(default_progress(Console(file=io.StringIO())), PlainProgress)
    assert isinstance(default_progress(Console(file=io.StringIO(), force_terminal=True)), BarProgress)


def test_watch_opens_one_task_per_name() -> None:
    stream = io.StringIO()
    with watch(PlainProgress(stream), prefix="budget 0.3: ") as notify:
        for what in ("curves", "re-rank"):
            for done in (1, 3):
                notify(done, 3, what)
    lines = [line.split("] ", 1)[1].rsplit(" in ", 1)[0] for line in stream.getvalue().splitlines()]
    assert lines == ["budget 0.3: curves 3/3", "budget 0.3: re-rank 3/3"]


def _both() -> list[tuple[Progress, io.StringIO]]:
    streams = [io.StringIO(), io.StringIO()]
    console = Console(file=streams[1], force_terminal=True, width=80)
    return [(PlainProgress(streams[0]), streams[0]), (BarProgress(console), streams[1])]
