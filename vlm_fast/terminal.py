"""Print tables and progress bars: styled in a terminal, plain text in a pipe; write CSV files."""

from __future__ import annotations

import csv
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a table. In a pipe each row is one line, whatever its width."""
    cells = [[str(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        table = Table(*columns, title=title, title_justify="left")
        for row in cells:
            table.add_row(*row)
        # Brackets in a cell are shapes, not markup.
        Console(markup=False, highlight=False).print(table)
        return
    widths = [max(map(len, column)) for column in zip(columns, *cells, strict=True)]
    print(title)
    for row in [list(columns), *cells]:
        print("  ".join(f"{c:<{w}}" for c, w in zip(row, widths, strict=True)).rstrip())
    print()


@contextmanager
def counter(what: str) -> Iterator[Callable[[int, int | None], None]]:
    """Yield a function ``update(done, total)`` that draws a progress bar on stderr.

    It draws nothing if stderr is not a terminal. ``what`` is the label of the bar.
    """
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda done, total: None
        return
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def write_csv(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Write rows as a CSV file, whose columns are all keys of all rows, in order of appearance.

    The items of a list are joined by semicolons. A cell that a spreadsheet would take for a formula
    gets an apostrophe before it.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        lines = csv.writer(file)
        lines.writerow([_csv_cell(name) for name in names])
        for row in rows:
            lines.writerow([_csv_cell(row.get(name)) for name in names])


def _csv_cell(value: object) -> object:
    if isinstance(value, list | tuple):
        value = "; ".join(map(str, value))
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@", "\t", "\r"):
        return f"'{value}"
    return "" if value is None else value


def why_not_writable(path: Path) -> str | None:
    """Why a file cannot be written at ``path``, or None. Checks permissions, writes nothing."""
    if path.is_dir():
        return f"{path} is a directory: name a file in it"
    folder = path.parent
    if not folder.is_dir():
        return f"there is no directory {folder}: make it first (mkdir -p {folder})"
    if not os.access(path if path.exists() else folder, os.W_OK):
        return f"{path} may not be written: choose another place"
    return None
