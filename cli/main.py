"""Define the `darkroom` command: its options, its commands, and how errors are shown.

Exit codes
0    done
1    done, with a bad result: a job did not succeed, the audit log is broken, …
2    the command line is wrong
3    nothing answers: the stack is not running, or the address is wrong
4    refused: by the gateway (the problem's title and detail are printed) or by Postgres
5    the stack cannot be started or stopped
130  interrupted with Ctrl-C
"""

import errno
import importlib
import sys
from pathlib import Path
from typing import Any

import click

from cli import screen
from cli.installation import Installation, NoInstallation
from darkroom_client import DarkroomError, ProblemError, Unreachable
from policy.version import VERSION

REPO = Path(__file__).resolve().parent.parent
BAD_ANSWER = 1
UNREACHABLE = 3
REFUSED = 4
NO_STACK = 5
INTERRUPTED = 130

# Each command and its module. The module is imported when the command is called, so `generate` does
# not wait for what `demo` loads.
_MODULES = {
    "up": "cli.stack",
    "down": "cli.stack",
    "status": "cli.stack",
    "logs": "cli.logs",
    "env": "cli.stack",
    "generate": "cli.generate",
    "estimate": "cli.estimate",
    "jobs": "cli.jobs",
    "watch": "cli.jobs",
    "trace": "cli.trace",
    "cancel": "cli.jobs",
    "replay": "cli.replay",
    "delete": "cli.jobs",
    "requeue": "cli.requeue",
    "sql": "cli.sql",
    "tenants": "cli.tenants",
    "keys": "cli.keys",
    "workers": "cli.workers",
    "usage": "cli.usage",
    "bill": "cli.bill",
    "audit": "cli.audit",
    "prune": "cli.prune",
    "backup": "cli.backup",
    "restore": "cli.backup",
    "check": "cli.check",
    "fleet": "cli.fleet",
    "models": "cli.models",
    "calibrate": "cli.calibrate",
    "demo": "cli.demo",
}


_STACK = "it is for the stack of one machine (`make up`); with containers"
_ELSEWHERE = {  # commands that need what an image does not hold, and what to do there instead
    "up": f"{_STACK}, use docker compose up --detach",
    "down": f"{_STACK}, use docker compose down",
    "status": f"{_STACK}, use docker compose ps or darkroom check",
    "env": f"{_STACK}, read the .env beside docker-compose.yml",
    "demo": f"{_STACK}, make an image with darkroom generate",
    "models": "a worker has the checkpoints: docker compose run --rm worker darkroom models",
}


def _not_here(name: str, *, missing: str) -> click.Command:
    """Return a command that fails and says in one sentence what to use instead."""

    def tell() -> None:
        raise NoInstallation(
            f"`darkroom {name}` does not work here ({missing} is not installed): "
            f"{_ELSEWHERE[name]}."
        )

    settings = {"ignore_unknown_options": True, "allow_extra_args": True}
    return click.Command(
        name,
        callback=tell,
        help=f"Not available here: {_ELSEWHERE[name]}.",
        context_settings=settings,
    )


class CommandGroup(click.Group):
    """Find the commands, and turn every expected error into one line and an exit code.

    An unexpected error keeps its traceback.
    """

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(_MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _MODULES:
            return None
        try:
            command = getattr(importlib.import_module(_MODULES[cmd_name]), cmd_name)
        except ModuleNotFoundError as error:
            if cmd_name not in _ELSEWHERE:
                raise
            return _not_here(cmd_name, missing=error.name or "")
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(INTERRUPTED)
        except Exception as error:
            refusal = refusal_of(error)
            if refusal is None:
                raise
            code, message = refusal
            screen.complain(message)
            ctx.exit(code)


def refusal_of(error: Exception) -> tuple[int, str] | None:
    """Return the exit code and the message of an expected error; None for any other."""
    if isinstance(error, ProblemError):
        return REFUSED, describe(error)
    if isinstance(error, (Unreachable, NoInstallation)):
        return UNREACHABLE, str(error)
    if isinstance(error, DarkroomError):
        return BAD_ANSWER, str(error)
    if (
        isinstance(error, OSError)
        and error.errno in (errno.EROFS, errno.EACCES, errno.ENOSPC)
        and error.filename
    ):
        return BAD_ANSWER, f"{error.filename}: {error.strerror}"
    if type(error).__module__.startswith(("click", "builtins")):
        return None
    return _refusal_of_stack_or_database(error)


def _refusal_of_stack_or_database(error: Exception) -> tuple[int, str] | None:
    """Do as `refusal_of` for errors of the stack and of Postgres, whose classes load slowly."""
    from sqlalchemy.exc import DBAPIError, OperationalError

    from cli.sql import StatementRefused
    from fleet.errors import StackError

    if isinstance(error, StackError):
        return NO_STACK, str(error)
    if isinstance(error, StatementRefused):
        return REFUSED, str(error)
    if isinstance(error, DBAPIError):
        code = UNREACHABLE if isinstance(error, OperationalError) else REFUSED
        return code, "Postgres: " + " ".join(str(error.orig).split())
    return None


def describe(problem: ProblemError) -> str:
    """Describe a problem in one line: title, detail, and what each wrong field accepts."""
    return str(problem)


@click.group(
    cls=CommandGroup,
    epilog="\b\n" + (__doc__ or "").partition("\n\n")[2],
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.option(
    "--data-dir",
    type=click.Path(path_type=Path, file_okay=False),
    default=REPO / ".darkroom",
    envvar="DARKROOM_DATA_DIR",
    help="Folder with the data of this machine's stack.  [default: .darkroom beside the program]",
)
@click.option(
    "--fleet-file",
    type=click.Path(path_type=Path, dir_okay=False, exists=True),
    envvar="FLEET_FILE",
    help="The models, tiers and pools to serve.  [default: fleet.toml beside the program]",
)
@click.version_option(VERSION, prog_name="darkroom", message="%(prog)s %(version)s")
@click.pass_context
def darkroom(ctx: click.Context, data_dir: Path, fleet_file: Path | None) -> None:
    """Run Darkroom on this machine, make images with it, and inspect it."""
    ctx.obj = Installation(data_dir.absolute(), fleet_file)


def main() -> None:
    """Run the command line and end the process with its exit code."""
    sys.exit(darkroom(prog_name="darkroom"))
