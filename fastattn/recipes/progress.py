"""One way to say how far a long computation is: a bar on a terminal, lines in a log file.

``rich`` shows nothing between start and end when its output goes to a file, and a run of ten
minutes that says nothing looks hung; so there a line is written every twenty seconds.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

SECONDS_BETWEEN_LINES = 20.0


class Advance(Protocol):
    """``advance(n, note)``: n more units are done; the note (a loss, say) stands beside the bar."""

    def __call__(self, count: int = 1, note: str = "") -> None: ...


@contextmanager
def progress(description: str, total: int, console: Console | None = None) -> Iterator[Advance]:
    """Show ``description`` and how many of ``total`` units are done; yields ``advance``."""
    console = console or Console(stderr=True)
    shown = _bar if console.is_terminal else _lines
    with shown(description, total, console) as advance:
        yield advance


@contextmanager
def _bar(description: str, total: int, console: Console) -> Iterator[Advance]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(description, total=total, note="")

        def advance(count: int = 1, note: str = "") -> None:
            bar.advance(task, count)
            if note:
                bar.update(task, note=note)

        yield advance


@contextmanager
def _lines(description: str, total: int, console: Console) -> Iterator[Advance]:
    start = last = time.monotonic()
    done = 0

    def say(note: str) -> None:
        seconds = time.monotonic() - start
        share = f"{done}/{total} ({100 * done // max(total, 1)} %)"
        line = f"{description} {share} {seconds:.0f} s {note}".rstrip()
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    def advance(count: int = 1, note: str = "") -> None:
        nonlocal done, last
        done += count
        now = time.monotonic()
        if done >= total or now - last >= SECONDS_BETWEEN_LINES:
            last = now
            say(note)

    yield advance
