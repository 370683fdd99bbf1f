"""Define `models add`: weights become a served model.

It tries the model in a process of its own before it writes: whatever happens to that, the
operator's fleet.toml stays as it was.
"""

import shutil
from collections.abc import Mapping
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
    fleet_and_text,
    looked_at,
)
from cli.fleet_text import NotWritable, model_text, with_model
from cli.importing import PREDICTIONS, imported
from cli.installation import Installation, pass_installation
from cli.pulling import fetched
from cli.trying import PROMPTS, show, trial
from engine.inspection import Inspection
from policy.fleet import (
    PRECISIONS,
    QUANTISATIONS,
    Fleet,
    FleetInvalid,
    parse_fleet,
    parse_size,
)
from policy.proposals import propose
from policy.sources import remote_source
from settings import DeviceSettings


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
@click.argument("path", metavar="PATH")
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
    path: str,
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
    A single file is made a folder first. PATH may be s3://BUCKET/PREFIX or hf:ORG/REPO@COMMIT as
    well, from where the weights are fetched into the cache.
    """
    check_name(name)
    settings = device_settings(installation)
    fleet, text = fleet_and_text(settings)
    home = _pool(fleet, pool, name)
    weights, source, digests = _brought(settings, path, name, like, prediction)
    found = _complete(weights)
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
            "source": source,
            **({"quantize": quantize} if quantize else {}),
            "sha256": digests or digests_of(found),
        },
    )
    table = {"title": table.pop("title"), "licence": licence, **table}
    if only_print:
        click.echo(model_text(name, table), nl=False)
        return
    changed = _changed(text, name, table, home)
    pictures = folder or installation.data_dir / "trials" / name
    show(trial(installation, changed, name, version_id, prompts or PROMPTS, pictures))
    _put_in_place(settings.fleet_file, text, changed, name)


def _brought(
    settings: DeviceSettings, place: str, name: str, like: Path | None, prediction: str | None
) -> tuple[Path, str, dict[str, str]]:
    """Have a checkpoint's folder here; return it, its `source`, and its digests if they are known.

    Raises click.ClickException.
    """
    try:
        remote = remote_source(place)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="PATH") from None
    if remote is not None:
        folder, digests = fetched(settings, remote, place)
        return folder, place, digests
    folder = LOCAL.convert(place, None, None)
    if folder.is_file():
        folder = imported(settings, folder, name, like=like, prediction=prediction)
    return folder, _source(folder, settings.checkpoint_root), {}


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
