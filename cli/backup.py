"""Define `backup` and `restore`: copy the stack of this machine to a folder and back."""

from pathlib import Path

import click

from cli import screen
from cli.installation import Installation, pass_installation

_FOLDER = click.argument("folder", type=click.Path(path_type=Path, file_okay=False))


@click.command()
@_FOLDER
@pass_installation
def backup(installation: Installation, folder: Path) -> None:
    """Back up the running stack into FOLDER, which must be new.

    The backup holds the database, all objects and all secrets: keep it where nobody else can read
    it. docs/backup.md says what it does not hold, and why.
    """
    with screen.err().status("copying"):
        made = installation.stack().back_up(folder.absolute())
    screen.out().print(
        f"{folder}: revision {made.revision}, {made.objects} objects, {made.object_bytes} bytes",
        soft_wrap=True,
    )


@click.command()
@_FOLDER
@pass_installation
def restore(installation: Installation, folder: Path) -> None:
    """Restore the backup in FOLDER into a new data directory.

    It brings back tenants, keys, jobs, images and audit log. Start the stack afterwards with
    `darkroom up`, which also migrates the database if this version is newer.
    """
    stack = installation.stack()
    with screen.err().status("restoring"):
        made = stack.restore(folder.absolute())
    screen.out().print(
        f"{stack.data_dir}: as of {made.made_at}, {made.objects} objects; "
        "start it with `darkroom up`",
        soft_wrap=True,
    )
