"""Print the command's output: answers on standard output, all else on standard error."""

import json
import sys
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

_PIPE_WIDTH = 4000  # into a pipe nothing is folded or cut


def out() -> Console:
    """Return a console for answers, new for each use so that it finds a redirected stream."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, emoji=False)


def err() -> Console:
    """Return a console for progress and complaints."""
    return Console(stderr=True, highlight=False, emoji=False)


def complain(message: str) -> None:
    """Print the message's first line in red, and the rest (a log's tail) without colour."""
    first, _, rest = message.partition("\n")
    console = err()
    console.print(f"[bold red]{escape(first)}[/]", soft_wrap=True)
    if rest:
        console.print(escape(rest), soft_wrap=True)


def warn(message: str) -> None:
    """Print a yellow line about something that worked and was probably not intended."""
    err().print(f"[yellow]{escape(message)}[/]", soft_wrap=True)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    numbers: Iterable[str] = (),
) -> Table:
    """Build a plain table of any values. numbers: the columns to align right."""
    flush_right = set(numbers)
    drawn = Table(
        title=title,
        title_justify="left",
        header_style="bold",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    for column in columns:
        drawn.add_column(
            column, justify="right" if column in flush_right else "left", overflow="fold"
        )
    for row in rows:
        drawn.add_row(*(Text(cell(value)) for value in row))  # Text: no markup, no :emoji:
    return drawn


def cell(value: Any) -> str:
    """Format one value for people."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3f}"
    if isinstance(value, datetime):
        return value.strftime("%Y-%m-%d %H:%M:%S.%f")[:-3]
    if isinstance(value, (dict, list)):
        return json.dumps(value, default=str, ensure_ascii=False)
    if isinstance(value, (bytes, memoryview)):
        return bytes(value).hex()
    return str(value)


def print_json(value: Any) -> None:
    """Print one JSON document, for programs."""
    sys.stdout.write(
        json.dumps(
            value,
            default=lambda odd: odd.isoformat() if isinstance(odd, datetime) else cell(odd),
            indent=2,
        )
        + "\n"
    )
