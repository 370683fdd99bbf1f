"""Tables for people; the line of JSON below them is for programs."""

from collections.abc import Container, Mapping, Sequence

from rich.console import Console
from rich.table import Table

WIDTH = 140


def make_table(
    title: str, columns: Sequence[str], *, left: Container[str] = ("",), caption: str = ""
) -> Table:
    """Make a table of figures. left: columns of text; all others are aligned to the right."""
    table = Table(title=title, caption=caption)
    for column in columns:
        table.add_column(column, justify="left" if column in left else "right")
    return table


def show(*tables: Table, width: int | None = None) -> None:
    """Print tables. width: of the widest, where a terminal's would cut it."""
    console = Console(width=width)
    for table in tables:
        console.print(table)


def show_figures(title: str, figures: Mapping[str, object], caption: str = "") -> None:
    """Print figures, a row each."""
    table = Table("figure", "value", title=title, caption=caption)
    for name, value in figures.items():
        table.add_row(name.replace("_", " "), _cell(value))
    show(table)


def _cell(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {inner}" for name, inner in value.items()) or "none"
    if isinstance(value, list):
        return "\n".join(map(str, value)) or "none"
    return "not recorded" if value is None else str(value)
