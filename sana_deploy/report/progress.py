"""Progress of long work on stderr: bars on a terminal, a few lines elsewhere."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from .terminal import console

Advance = Callable[[str, int, int], None]
"""Called with the current item, how many are done, and how many there are."""


@contextlib.contextmanager
def progress(title: str, brief: bool = False) -> Iterator[Advance]:
    """Show a progress bar on stderr while the block runs; on no terminal, one line per quarter, `brief`: none."""
    out = console()
    if not out.is_terminal:
        yield (lambda item, done, of: None) if brief else _quarters(out, title)
        return
    with _bars(out) as display:
        task = display.add_task("", total=None)
        yield lambda item, done, of: display.update(task, description=f"{title:<10} {item}", completed=done, total=of)


@contextlib.contextmanager
def progress_each(title: str, brief: bool = False) -> Iterator[Advance]:
    """Show a bar per item, items side by side; on no terminal, one line as each item ends."""
    out = console()
    if not out.is_terminal:
        yield lambda item, done, of: out.print(Text(f"{title}: {item}")) if done >= of and not brief else None
        return
    with _bars(out) as display:
        tasks: dict[str, Any] = {}

        def advance(item: str, done: int, of: int) -> None:
            if item not in tasks:
                tasks[item] = display.add_task(f"{title:<10} {item:<12}")
            display.update(tasks[item], completed=done, total=of)

        yield advance


def _bars(out: Console) -> Any:
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    return Progress(*columns, console=out, transient=True)


def _quarters(out: Console, title: str) -> Advance:
    shown = -1

    def advance(item: str, done: int, of: int) -> None:
        nonlocal shown
        if (quarter := done * 4 // max(of, 1)) > shown:
            shown = quarter
            out.print(Text(f"{title}: {item}"))

    return advance
