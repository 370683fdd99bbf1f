"""Define `logs`: print what the processes of the stack log, each line with its process's name."""

import json
import sys
import time
import uuid
from contextlib import suppress
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from cli import screen
from cli.installation import Installation, NoInstallation, pass_installation

_COLOURS = (
    "cyan",
    "green",
    "yellow",
    "magenta",
    "blue",
    "bright_cyan",
    "bright_green",
    "bright_yellow",
    "bright_magenta",
    "bright_blue",
)
_LOOK_EVERY_S = 0.3


@click.command()
@click.argument("name", required=False)
@click.option("-f", "--follow", "is_following", is_flag=True, help="Print new lines until Ctrl-C.")
@click.option(
    "-n",
    "--lines",
    type=click.IntRange(0),
    default=40,
    show_default=True,
    help="Lines to print of each log.",
)
@click.option(
    "--job",
    "job_id",
    type=click.UUID,
    help="Print every line that names this job, of all processes, in the order of time.",
)
@pass_installation
@click.pass_context
def logs(
    ctx: click.Context,
    installation: Installation,
    name: str | None,
    is_following: bool,
    lines: int,
    job_id: uuid.UUID | None,
) -> None:
    """Print the end of the logs, of all processes or of NAME, or all that they say of one job."""
    folder = installation.data_dir / "logs"
    if not folder.exists() and not name:
        raise NoInstallation(
            f"There are no logs in {folder}: start a stack here, "
            "or with containers, docker compose logs."
        )
    wanted = "worker-1" if name == "worker" else name
    if wanted and not (folder / f"{wanted}.log").exists():
        known = ", ".join(sorted(path.stem for path in folder.glob("*.log"))) or "none yet"
        screen.complain(f"No log {name!r}; there are: {known}.")
        ctx.exit(2)
    if job_id is None:
        follow(folder, only=wanted, num_lines=lines, is_endless=is_following)
        return
    _print_of_job(folder, str(job_id), only=wanted)
    if is_following:
        follow(folder, only=wanted, holding=str(job_id))


def follow(
    folder: Path,
    *,
    only: str | None = None,
    num_lines: int = 0,
    is_endless: bool = True,
    holding: str = "",
) -> None:
    """Print the last `num_lines` of each log in `folder`; if endless, go on with new lines.

    holding: leave out new lines that do not have it.
    """
    console = Console(file=sys.stdout, highlight=False, emoji=False, soft_wrap=True)
    positions: dict[Path, int] = {}
    for path in _logs(folder, only):
        lines = path.read_text(errors="replace").splitlines()
        positions[path] = path.stat().st_size
        for line in lines[len(lines) - num_lines :] if num_lines else []:
            _print(console, path.stem, line)
    while is_endless:
        for path in _logs(folder, only):
            lines, positions[path] = _read_lines(path, positions.get(path, 0))
            for line in lines:
                if holding in line:
                    _print(console, path.stem, line)
        time.sleep(_LOOK_EVERY_S)


def _print_of_job(folder: Path, job_id: str, *, only: str | None) -> None:
    """Print what the logs say of a job, and of the request that made it, by the time they tell."""
    of_logs = {
        path.stem: path.read_text(errors="replace").splitlines() for path in _logs(folder, only)
    }
    own = [(name, line) for name, lines in of_logs.items() for line in lines if job_id in line]
    requests = {request for _, line in own if (request := _member(line, "request_id"))}
    found = [
        (_member(line, "timestamp"), name, line)
        for name, lines in of_logs.items()
        for line in lines
        if job_id in line or (requests and _member(line, "request_id") in requests)
    ]
    console = Console(file=sys.stdout, highlight=False, emoji=False, soft_wrap=True)
    for _, name, line in sorted(found):
        _print(console, name, line)


def _member(line: str, name: str) -> str:
    """Read a member of a line that is a JSON object; "" if it has none."""
    if not line.startswith("{"):
        return ""
    with suppress(ValueError):
        return str(json.loads(line).get(name) or "")
    return ""


def _read_lines(path: Path, position: int) -> tuple[list[str], int]:
    """Read the complete lines after `position`; return them, and the position after them."""
    if path.stat().st_size < position:  # rotated
        position = 0
    with open(path, "rb") as file:
        file.seek(position)
        # An incomplete line waits until its end is written.
        whole, newline, _ = file.read().rpartition(b"\n")
    lines = whole.decode(errors="replace").splitlines()
    return lines, position + len(whole) + len(newline)


def _logs(folder: Path, only: str | None) -> list[Path]:
    return (
        [folder / f"{only}.log"]
        if only
        else sorted(path for path in folder.glob("*.log") if path.stem != "supervisord")
    )


def _print(console: Console, name: str, line: str) -> None:
    colour = _COLOURS[sum(name.encode()) % len(_COLOURS)]
    console.print(Text(f"{name:>10} │ ", style=colour) + Text.from_ansi(line))
