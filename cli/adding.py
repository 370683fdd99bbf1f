"""Define `models import`, `add` and `try`: a file becomes a folder, a folder a served model.

`add` tries the model in a process of its own before it writes: whatever happens to that, the
operator's fleet.toml stays as it was.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from cli import screen
from cli.checkpoints import (
    LOCAL,
    check_name,
    device_settings,
    digests_of,
    facts_of,
    in_bytes,
    looked_at,
)
from cli.fleet_text import NotWritable, model_text, with_model
from cli.installation import Installation, pass_installation
from engine.inspection import Inspection
from policy.fleet import (
    PRECISIONS,
    QUANTISATIONS,
    Fleet,
    FleetInvalid,
    checkpoint_name,
    parse_fleet,
    parse_size,
)
from policy.proposals import propose
from settings import REPO, DeviceSettings

PROMPTS = ("a lighthouse on a cliff at dusk, oil painting", "a photo of a red fox in the snow")
PREDICTIONS = ("epsilon", "v_prediction")


# --- import ---------------------------------------------------------------------------------------


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


# --- add ------------------------------------------------------------------------------------------


def _checked_sizes(ctx: click.Context, option: click.Parameter, said: tuple[str, ...]) -> Any:
    """Return the sizes as they were said. Raises click.BadParameter for one that is none."""
    for size in said:
        try:
            parse_size(size)
        except ValueError as problem:
            raise click.BadParameter(f"{size!r}: {problem}") from None
    return said


@click.command()
@click.argument("name")
@click.argument("path", type=LOCAL)
@click.option("--print", "only_print", is_flag=True, help="Print the table, and do nothing else.")
@click.option("--pool", help="Pool that it joins.  [default: the first of fleet.toml]")
@click.option(
    "--size",
    "sizes",
    multiple=True,
    metavar="WIDTHxHEIGHT",
    callback=_checked_sizes,
    help="Size that may be asked for; once for each.  [default: those that suit it]",
)
@click.option("--title", help="Name for people.  [default: NAME]")
@click.option("--licence", default="unknown", show_default=True, help="Licence of its weights.")
@click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    help="What it is computed in.  [default: fp32 on a CPU; on a GPU as it is stored, or bf16]",
)
@click.option(
    "--quantize",
    type=click.Choice(QUANTISATIONS),
    help="Hold weights of linear layers in 8 bits: less memory, no less time.",
)
@click.option("--prompt", "prompts", multiple=True, help="What the pictures show; once for each.")
@click.option(
    "--pictures",
    "folder",
    type=click.Path(path_type=Path, file_okay=False),
    help="Where they are stored.  [default: a folder below the stack's data]",
)
@click.option("--like", type=LOCAL, help="Of a single file: as for `models import`.")
@click.option(
    "--prediction",
    type=click.Choice(PREDICTIONS),
    help="Of a single file: what the network predicts, if the file does not say so.",
)
@click.option(
    "--version", "version_id", default="1", show_default=True, help="Name of the weights."
)
@pass_installation
def add(
    installation: Installation,
    name: str,
    path: Path,
    only_print: bool,
    pool: str | None,
    sizes: tuple[str, ...],
    title: str | None,
    licence: str,
    precision: str | None,
    quantize: str | None,
    prompts: tuple[str, ...],
    folder: Path | None,
    like: Path | None,
    prediction: str | None,
    version_id: str,
) -> None:
    """Serve the checkpoint at PATH as model NAME: digests, a table in fleet.toml, a trial.

    The model is loaded in a process of its own, its forwards are measured for this device, and
    pictures are made to look at. Only then fleet.toml is written, with a copy of what it was.
    A single file is made a folder first.
    """
    check_name(name)
    settings = device_settings(installation)
    text, fleet = _read_fleet(settings)
    home = _pool(fleet, pool, name)
    if path.is_file():
        path = imported(settings, path, name, like=like, prediction=prediction)
    found = _complete(path)
    table = propose(
        facts_of(found),
        fleet,
        title=title or name,
        sizes=sizes,
        pool=home,
        precision=precision or _precision(found, settings),
        created_at=datetime.now(UTC).replace(microsecond=0),
        version={
            "id": version_id,
            "source": _source(path, settings.checkpoint_root),
            **({"quantize": quantize} if quantize else {}),
            "sha256": digests_of(found),
        },
    )
    table = {"title": table.pop("title"), "licence": licence, **table}
    if only_print:
        click.echo(model_text(name, table), nl=False)
        return
    changed = _changed(text, name, table, home)
    pictures = folder or installation.data_dir / "trials" / name
    settings = _with_curves(settings, installation)
    _show(_trial(settings, changed, name, version_id, prompts or PROMPTS, pictures))
    _put_in_place(settings.fleet_file, text, changed, name)


def _put_in_place(file: Path, text: str, changed: str, name: str) -> None:
    """Write fleet.toml, with a copy of what it was, and say how to go on."""
    backup = _write(file, text, changed)
    click.echo(f"{file}: holds {name} now; {backup.name} is what it was")
    click.echo("look at the pictures, then serve it: ./darkroom up --detach")


def _complete(path: Path) -> Inspection:
    """Look at a checkpoint and warn of what is odd. Raises click.ClickException if parts lack."""
    found = looked_at(path)
    if found.missing:
        raise click.ClickException(f"{path}: {'; '.join(found.missing)}")
    for note in found.notes:
        screen.warn(note)
    return found


@click.command("try")
@click.argument("model", required=False)
@click.option("--prompt", "prompts", multiple=True, help="What the pictures show; once for each.")
@pass_installation
@click.pass_context
def try_models(
    ctx: click.Context, installation: Installation, model: str | None, prompts: tuple[str, ...]
) -> None:
    """Load every version of MODEL, or of every model of fleet.toml, and make pictures with it.

    Each in a process of its own, so that one that fails is told and the others are tried. Exit code
    1 if any fails. Nothing is changed but the curves of this device.
    """
    settings = _with_curves(device_settings(installation), installation)
    text, fleet = _read_fleet(settings)
    if model is not None and model not in fleet.models:
        known = ", ".join(fleet.models)
        raise click.BadParameter(f"{model!r} is none of {known}", param_hint="MODEL")
    failed = 0
    for name, entry in fleet.models.items():
        for version in entry.versions if model in (None, name) else ():
            pictures = installation.data_dir / "trials" / checkpoint_name(name, version.id)
            try:
                _show(_trial(settings, text, name, version.id, prompts or PROMPTS[:1], pictures))
            except click.ClickException as problem:
                failed += 1
                screen.complain(problem.message)
    ctx.exit(1 if failed else 0)


def _with_curves(settings: DeviceSettings, installation: Installation) -> DeviceSettings:
    """Return the settings with a folder for curves: as `calibrate`, the stack's by default."""
    curves = settings.curves_folder or installation.data_dir / "curves"
    return settings.model_copy(update={"curves_folder": curves.absolute()})


def _read_fleet(settings: DeviceSettings) -> tuple[str, Fleet]:
    """Return the text of fleet.toml and what it says. Raises click.ClickException."""
    try:
        text = settings.fleet_file.read_text("utf-8")
        return text, parse_fleet(text)
    except OSError as error:
        raise click.ClickException(f"{settings.fleet_file}: {error.strerror}") from None
    except FleetInvalid as error:
        raise click.ClickException(f"{settings.fleet_file}: {'; '.join(error.problems)}") from None


def _pool(fleet: Fleet, wanted: str | None, name: str) -> str:
    """Choose the pool that a new model joins. Raises click.BadParameter, also for a taken name."""
    if name in fleet.model_ids:
        raise click.BadParameter(f"{name!r} is taken by a model or alias", param_hint="NAME")
    pool = wanted or next(iter(fleet.pools))
    if pool not in fleet.pools:
        raise click.BadParameter(
            f"{pool!r} is none of {', '.join(fleet.pools)}", param_hint="--pool"
        )
    return pool


def _source(path: Path, root: Path) -> str:
    """Name the folder as fleet.toml does: below the root, else in full."""
    absolute = path.resolve()
    base = root.resolve()
    return str(absolute.relative_to(base) if absolute.is_relative_to(base) else absolute)


def _precision(found: Inspection, settings: DeviceSettings) -> str:
    """Return the precision that suits the device: fp32 on a CPU, which is slow at half."""
    has_gpu = settings.device.startswith("cuda")
    if settings.device == "auto":
        import torch  # a second or two, and nothing else knows

        has_gpu = torch.cuda.is_available()
    if not has_gpu:
        return "fp32"
    stored = found.stored_as[:1]
    return stored[0] if stored and stored[0] in ("fp16", "bf16") else "bf16"


def _changed(text: str, name: str, table: Mapping[str, Any], pool: str) -> str:
    """Return the text of fleet.toml with the model in it, checked. Raises click.ClickException."""
    try:
        changed = with_model(text, name, table, pool)
        parse_fleet(changed)
    except NotWritable as error:
        raise click.ClickException(str(error)) from None
    except FleetInvalid as error:
        told = "; ".join(error.problems)
        raise click.ClickException(f"the table does not fit fleet.toml: {told}") from None
    return changed


def _trial(
    settings: DeviceSettings,
    text: str,
    name: str,
    version: str,
    prompts: tuple[str, ...],
    pictures: Path,
) -> dict[str, Any]:
    """Load the model in a process of its own and have it make pictures; return what it tells.

    text: of a fleet.toml that has the model.

    Raises click.ClickException.
    """
    checkpoint = checkpoint_name(name, version)
    pictures.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="darkroom-trial-") as place:
        file = Path(place) / "fleet.toml"
        file.write_text(text, "utf-8")
        environment = {
            **os.environ,
            "FLEET_FILE": str(file),
            "CHECKPOINT_ROOT": str(settings.checkpoint_root.absolute()),
            "CURVES_FOLDER": str(settings.curves_folder),
            "PYTHONPATH": str(REPO),
            "DEVICE": settings.device,
            "TORCH_THREADS": str(settings.torch_threads),
        }
        order = {"model": name, "version": version, "prompts": prompts}
        order["folder"] = str(pictures.absolute())
        with screen.err().status(f"loading {checkpoint} and making {len(prompts)} pictures"):
            done = subprocess.run(
                [sys.executable, "-P", "-m", "cli.trial"],
                input=json.dumps(order),
                env=environment,
                capture_output=True,
                text=True,
            )
    answer = _answer_in(done.stdout)
    if done.returncode == 0 and answer is not None:
        return answer
    if answer is not None and "problem" in answer:
        raise click.ClickException(f"{checkpoint}: {answer['problem']}")
    raise click.ClickException(_told_by(done.returncode, done.stderr, checkpoint))


def _answer_in(output: str) -> dict[str, Any] | None:
    """Return the trial's answer: the last line of its output."""
    lines = output.strip().splitlines()
    with contextlib.suppress(ValueError):
        answer = json.loads(lines[-1]) if lines else None
        return answer if isinstance(answer, dict) else None
    return None


def _told_by(status: int, log: str, name: str) -> str:
    """Say why a trial ended that gave no answer."""
    tail = "\n".join(log.strip().splitlines()[-15:])
    if status < 0:
        by = signal.Signals(-status).name
        hint = ", perhaps for want of memory" if by == "SIGKILL" else ""
        return f"{name}: its trial was ended by {by}{hint}\n{tail}"
    return f"{name}: its trial ended with {status}\n{tail}"


def _show(answer: Mapping[str, Any]) -> None:
    """Print what the trial found out."""
    rows = [
        (each["prompt"], each["size"], each["steps"], f"{each['seconds']:.1f}", each["file"])
        for each in answer["pictures"]
    ]
    columns = ("picture of", "size", "steps", "s", "file")
    title = f"{answer['checkpoint']}, loaded in {answer['load_s']:.1f} s on {answer['device']}"
    screen.out().print(screen.table(columns, rows, title=title, numbers=("steps", "s")))
    screen.err().print(f"curve of this device: {answer['curves']}", style="dim", markup=False)
    for note in answer["notes"]:
        screen.warn(note)


def _write(file: Path, before: str, after: str) -> Path:
    """Replace the file in one step, and keep what it was; return the copy.

    Raises click.ClickException where somebody else changed it meanwhile.
    """
    if file.read_text("utf-8") != before:
        raise click.ClickException(f"{file}: was changed meanwhile, and stays so; add it again")
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    backup = file.with_name(f"{file.name}.{stamp}")
    shutil.copy2(file, backup)
    unfinished = file.with_name(f".{file.name}.unfinished")
    unfinished.write_text(after, "utf-8")
    shutil.copymode(file, unfinished)
    unfinished.replace(file)
    return backup
