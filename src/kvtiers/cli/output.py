"""What every command prints with: JSON on stdout, tables that a pipe does not cut, and progress on stderr once it takes a second.

stdout carries the result and nothing else, so that `--json` can be piped; progress and notes go to stderr.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, Final, TypeVar

import typer

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
Advance = Callable[[int], None]
"""So many more of the total are done."""

_PROGRESS_AFTER_S: Final = 1.0
_PIPE_WIDTH: Final = 200  # rich would fold a table to 80 columns in a pipe

JSON_OPTION: Final = typer.Option("--json", help="Print JSON instead of text.")


def print_json(value: object) -> None:
    """`value` as indented JSON on stdout; dataclasses, paths, enums and bytes (as hex) included."""
    text = json.dumps(value, indent=2, ensure_ascii=False, default=_plain)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:  # a path that is no text, or a terminal that knows ASCII only
        text = json.dumps(value, indent=2, default=_plain)
    typer.echo(text)


def _plain(value: object) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(f"{type(value).__name__} has no JSON form")


def note(message: str) -> None:
    """A line for the operator, on stderr."""
    typer.echo(message, err=True)


def console() -> Console:
    """For stdout: as wide as the terminal, or wide enough for a pipe."""
    from rich.console import Console

    return Console(
        width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False, soft_wrap=False
    )


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[object]], *, right: Sequence[str] = ()
) -> None:
    """A plain table. `right`: the columns that hold numbers."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, justify="right" if column in right else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(str, row))
    console().print(table)


@contextmanager
def progress(
    what: str, total: int | None = None, *, clock: Callable[[], float] = time.monotonic
) -> Iterator[Advance]:
    """A bar on stderr, from the second second on and only on a terminal. Call what it gives with each step done."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    task = bar.add_task(what, total=total)
    started = clock()

    def advance(steps: int = 1) -> None:
        bar.advance(task, steps)
        if not bar.live.is_started and bar.console.is_terminal and clock() - started >= _PROGRESS_AFTER_S:
            bar.start()

    try:
        yield advance
    finally:
        if bar.live.is_started:
            bar.stop()


def tracked(items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
    """`items` as they come, with `progress`."""
    if total is None and isinstance(items, Sequence):
        total = len(items)
    with progress(what, total) as advance:
        for item in items:
            yield item
            advance(1)
