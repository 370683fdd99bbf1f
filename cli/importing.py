"""Define `models import`: a single file becomes a folder."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import click

from cli import screen
from cli.checkpoints import LOCAL, check_name, device_settings, in_bytes, looked_at
from cli.installation import Installation, pass_installation
from settings import DeviceSettings

PREDICTIONS = ("epsilon", "v_prediction")


@click.command("import")
@click.argument("file", type=LOCAL)
@click.argument("name")
@click.option("--like", type=LOCAL, help="Folder whose configurations and tokenizers are taken.")
@click.option(
    "--prediction",
    type=click.Choice(PREDICTIONS),
    help="What the network predicts, if the file does not say so.",
)
@pass_installation
def import_checkpoint(
    installation: Installation, file: Path, name: str, like: Path | None, prediction: str | None
) -> None:
    """Make a folder NAME below CHECKPOINT_ROOT of a single .safetensors FILE, offline.

    Of SD 1.x, SD 2.x and SDXL. The folder can then be added: `models add NAME FOLDER`.
    """
    check_name(name)
    settings = device_settings(installation)
    folder = imported(settings, file, name, like=like, prediction=prediction)
    click.echo(f"{folder}: look at it with `./darkroom models inspect`")


def imported(
    settings: DeviceSettings,
    file: Path,
    name: str,
    *,
    like: Path | None = None,
    prediction: str | None = None,
) -> Path:
    """Make a folder of a single file; return it. Raises click.ClickException."""
    folder = settings.checkpoint_root / name
    if folder.exists():
        raise click.ClickException(f"{folder}: is there already; take another name")
    with screen.err().status(f"converting {file.name} to {folder}"), as_one_sentence():
        from engine.singlefile import import_file

        found = import_file(file, folder, like=like, prediction=prediction)
    seen = looked_at(file)
    if prediction is None and seen.is_prediction_assumed:
        screen.warn(
            f"nothing in the file says what it predicts; {seen.prediction} is assumed;"
            " say otherwise with --prediction"
        )
    screen.err().print(f"{found.title}, {in_bytes(found.size_bytes)}", style="dim")
    return folder


@contextlib.contextmanager
def as_one_sentence() -> Iterator[None]:
    """Turn what is wrong with a checkpoint into the command's error."""
    from engine.errors import EngineError

    try:
        yield
    except EngineError as problem:
        raise click.ClickException(str(problem)) from None
