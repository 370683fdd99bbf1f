"""How the command speaks: answers on standard output, everything else on standard error."""

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
    """Where answers go. Made anew for each use, so that a redirected stream is found."""
    return Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, emoji=False)


def err() -> Console:
    """Where progress and complaints go."""
    return Console(stderr=True, highlight=False, emoji=False)


def complain(message: str) -> None:
    """One clear red line; a log's tail that comes with it is left uncoloured below."""
    first, _, rest = message.partition("\n")
    console = err()
    console.print(f"[bold red]{escape(first)}[/]", soft_wrap=True)
    if rest:
        console.print(escape(rest), soft_wrap=True)


def warn(message: str) -> None:
    """One yellow line about what went well and is not what was meant."""
    err().print(f"[yellow]{escape(message)}[/]", soft_wrap=True)


def table(
    columns: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    title: str | None = None,
    numbers: Iterable[str] = (),
) -> Table:
    """A plain table of any values. numbers: the columns to be set flush right."""
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
    """One value as people read it."""
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
    """For programs: one JSON document."""
    sys.stdout.write(
        json.dumps(
            value,
            default=lambda odd: odd.isoformat() if isinstance(odd, datetime) else cell(odd),
            indent=2,
        )
        + "\n"
    )
