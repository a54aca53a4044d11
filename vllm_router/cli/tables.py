"""Tables: drawn on a terminal, plain aligned text elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

from vllm_router.observability.formatting import visible


@dataclass(frozen=True, slots=True)
class Column:
    """`right` aligns figures."""

    title: str
    right: bool = False


@dataclass(frozen=True, slots=True)
class Cell:
    """`style` is a Rich style, used on a terminal."""

    text: str
    style: str = ""


Row = Sequence[Cell | str]


def print_table(columns: Sequence[Column], rows: Sequence[Row]) -> None:
    """Print a table to stdout. Cell texts are escaped, because servers choose some of them."""
    cells = [[_cell(cell) for cell in row] for row in rows]
    if sys.stdout.isatty():
        _draw(columns, cells)
    else:
        for line in plain_lines(columns, cells):
            print(line)  # noqa: T201  a command's output


def plain_lines(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> list[str]:
    """Columns two spaces apart, for files and pipes."""
    texts = [[column.title for column in columns], *([cell.text for cell in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*texts, strict=True)]
    return [
        "  ".join(
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(line, widths, columns, strict=True)
        ).rstrip()
        for line in texts
    ]


def _cell(cell: Cell | str) -> Cell:
    text, style = (cell, "") if isinstance(cell, str) else (cell.text, cell.style)
    return Cell(visible(text) or "-", style)


def _draw(columns: Sequence[Column], rows: Sequence[Sequence[Cell]]) -> None:
    # Importing Rich takes 50 ms; only a terminal needs it.
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold")
    for column in columns:
        # Fold long values: a cut value could not be copied.
        table.add_column(column.title, justify="right" if column.right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell.text, style=cell.style) for cell in row))
    Console().print(table)
