"""Define `models`: look at checkpoints, compare them with fleet.toml, and bring new ones into it.

What only looks reads headers and configurations, and imports no torch.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from cli import screen
from cli.adding import add
from cli.checkpoints import (
    LOCAL,
    device_settings,
    digests_of,
    facts_of,
    hashed,
    in_bytes,
    looked_at,
    models_named,
)
from cli.fleet_text import digests_text
from cli.importing import import_checkpoint
from cli.installation import Installation, pass_installation
from cli.pulling import pull
from cli.trying import try_models
from engine.errors import CheckpointCorrupt
from engine.folders import files_read, part_names
from engine.inspection import Inspection, Part, inspect
from policy.fleet import PRECISIONS, Fleet, Model, ModelVersion, checkpoint_name
from policy.proposals import fitting_samplers
from policy.sources import remote_source
from settings import DeviceSettings, load_fleet_or_exit
from tasks.weights import Places, Weights, digests_in, wanted_of


@click.group()
def models() -> None:
    """Look at checkpoints and adapters, compare them with fleet.toml, and bring new ones in."""


models.add_command(import_checkpoint)
models.add_command(add)
models.add_command(try_models)
models.add_command(pull)


# --- inspect --------------------------------------------------------------------------------------


@models.command("inspect")
@click.argument("path", type=LOCAL)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@click.pass_context
def inspect_path(ctx: click.Context, path: Path, as_json: bool) -> None:
    """Tell what a folder, a single .safetensors file or a LoRA is. Nothing is loaded.

    Exit code 1 if it lacks something without which it cannot be served.
    """
    found = looked_at(path)
    if as_json:
        screen.print_json(as_document(found))
    else:
        _print_inspection(found)
    ctx.exit(1 if found.missing else 0)


def as_document(found: Inspection) -> dict[str, Any]:
    """Return what is known of a checkpoint, JSON-plain."""
    document = {**asdict(found), "path": str(found.path)}
    document |= {
        "size_bytes": found.size_bytes,
        "num_values": found.num_values,
        "stored_as": list(found.stored_as),
    }
    if found.kind == "folder":
        document["samplers"] = fitting_samplers(facts_of(found))
        document["weights_bytes"] = {name: found.weights_bytes(name) for name in PRECISIONS}
        document["quantised_bytes"] = {
            name: found.weights_bytes(name, is_quantised=True) for name in PRECISIONS
        }
    return document


def _print_inspection(found: Inspection) -> None:
    out = screen.out()
    out.print(screen.table(("", ""), list(_rows(found)), title=str(found.path)))
    if found.parts:
        columns = ("part", "class", "values", "stored as", "size", "files", "not read")
        rows = [_part_row(part) for part in found.parts]
        out.print(screen.table(columns, rows, numbers=("values", "size", "files")))
    for sentence in found.missing:
        screen.complain(sentence)
    for sentence in found.notes:
        screen.warn(sentence)


def _rows(found: Inspection) -> Iterator[tuple[str, str]]:
    """Yield what people are told of a checkpoint."""
    yield "what", f"{found.title} ({found.kind})"
    if found.family:
        yield "family", found.family
    if found.kind == "adapter":
        yield "largest rank", screen.cell(found.rank)
        yield "layers", str(found.num_layers)
        yield "trigger words", ", ".join(found.trigger_words) or "none are noted in the file"
        return
    if found.prediction:
        yield "predicts", found.prediction + (", zero terminal SNR" if found.zero_snr else "")
    if found.guidance_distilled is not None:
        yield "guidance", "an input of the network" if found.guidance_distilled else "by two rows"
    if found.few_steps:
        yield "steps", "distilled to a few"
    if found.only_repaints:
        yield "needs", "a picture and a mask"
    if found.native_side_px:
        yield "made for", f"{found.native_side_px}x{found.native_side_px}"
    yield "sides", f"multiples of {found.side_multiple_px}"
    if found.kind == "folder":
        yield "samplers", ", ".join(fitting_samplers(facts_of(found)))
    memory = ", ".join(f"{in_bytes(found.weights_bytes(each))} as {each}" for each in PRECISIONS)
    yield "weights in memory", f"{memory}; images come on top"
    if found.kind == "folder":
        quantised = found.weights_bytes("bf16", is_quantised=True)
        yield "quantised", f"{in_bytes(quantised)} as bf16 with int8 or float8"


def _part_row(part: Part) -> tuple[object, ...]:
    stored = ", ".join(part.dtypes) + (f" (variant {part.variant})" if part.variant else "")
    unread = f"{len(part.unread)} ({in_bytes(part.unread_bytes)})" if part.unread else "-"
    values = f"{part.num_values:,}" if part.num_values else "-"
    files = part.num_shards or "-"
    return (
        part.name,
        part.kind or "-",
        values,
        stored or "-",
        in_bytes(part.size_bytes),
        files,
        unread,
    )


# --- digest, verify -------------------------------------------------------------------------------


@models.command()
@click.argument("path", type=LOCAL)
@click.option("--name", default="NAME", show_default=True, help="Name of the model in fleet.toml.")
def digest(path: Path, name: str) -> None:
    """Print the sha256 of every file that is read, as the table for fleet.toml.

    Put it below the version of the model. Of an adapter: the line for its table.
    """
    if path.is_file():
        click.echo(f'sha256 = "{hashed(path)}"')
        return
    found = looked_at(path)
    for sentence in found.missing:
        screen.warn(sentence)
    click.echo(digests_text(name, digests_of(found)), nl=False)


@dataclass(frozen=True)
class _Entry:
    """One version of a model in the fleet."""

    model_name: str
    model: Model
    version: ModelVersion
    path: Path

    @property
    def name(self) -> str:
        """Name these weights, as in "sdxl@1"."""
        return checkpoint_name(self.model_name, self.version.id)

    @property
    def is_remote(self) -> bool:
        """Tell whether they are fetched from elsewhere."""
        return remote_source(self.version.source) is not None


def _entries(fleet: Fleet, places: Places, model: str | None = None) -> list[_Entry]:
    """List the versions of one model or of all. Raises click.BadParameter."""
    return [
        _Entry(name, entry, version, places.folder_of(version))
        for name, entry in models_named(fleet, model).items()
        for version in entry.versions
    ]


@models.command()
@click.argument("model", required=False)
@pass_installation
@click.pass_context
def verify(ctx: click.Context, installation: Installation, model: str | None) -> None:
    """Compare the files of MODEL, or of every model, with the digests in fleet.toml.

    Exit code 1 if a file is missing, altered or not listed.
    """
    settings = device_settings(installation)
    entries = _entries(load_fleet_or_exit(settings), _places(settings), model)
    is_sound = True
    for entry in entries:
        faults = list(_cache_faults(entry, settings) if entry.is_remote else _faults(entry))
        is_sound = is_sound and not faults
        _tell_faults(entry, faults)
    for name, served in {entry.model_name: entry.model for entry in entries}.items():
        for fault in _adapter_faults(name, served, _places(settings)):
            is_sound = False
            screen.complain(fault)
    ctx.exit(0 if is_sound else 1)


def _tell_faults(entry: _Entry, faults: list[str]) -> None:
    for fault in faults:
        screen.complain(f"{entry.name}: {fault}")
    listed = len(entry.version.sha256)
    if not faults and listed:
        screen.out().print(f"{entry.name}: all {listed} files are as listed", markup=False)
    elif not faults:
        screen.warn(f"{entry.name}: fleet.toml lists no digests; `./darkroom models digest` does")


def _faults(entry: _Entry) -> Iterator[str]:
    """Yield what is wrong with the files of one version, a sentence each."""
    try:
        read_names = files_read(entry.path, part_names(entry.model.family, entry.path))
    except CheckpointCorrupt as problem:
        yield str(problem)
        return
    listed = entry.version.sha256
    for name, sha256 in listed.items():
        if not (entry.path / name).is_file():
            yield f"{name}: is missing"
            continue
        actual = hashed(entry.path / name)
        if actual != sha256:
            yield f"{name}: has sha256 {actual}, not {sha256}"
    if listed:
        yield from (f"{name}: is read, and not listed" for name in read_names if name not in listed)


def _cache_faults(entry: _Entry, settings: DeviceSettings) -> Iterator[str]:
    """Yield what is wrong with a version's files in the cache; damaged ones are removed."""
    cache = Weights(settings).cache
    assert cache is not None, "these settings have a folder for it"
    again = f"`./darkroom models pull {entry.model_name}` fetches it"
    for name, digest in entry.version.sha256.items():
        if not cache.has(digest):
            yield f"{name}: is not fetched; {again}"
        elif cache.remove_damaged(digest):
            yield f"{name}: is damaged; {again} again"


def _adapter_faults(name: str, model: Model, places: Places) -> Iterator[str]:
    for adapter, told in model.adapters.items():
        file = places.file_of(told)
        if not file.is_file():
            yield f"{name}: adapter {adapter}: {told.source}: is missing"
        elif hashed(file) != told.sha256:
            yield f"{name}: adapter {adapter}: {told.source}: is not the file that is listed"


# --- list, du -------------------------------------------------------------------------------------


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@pass_installation
def list_models(installation: Installation, as_json: bool) -> None:
    """List the models of fleet.toml: versions, size on disk, and whether their files are there."""
    settings = device_settings(installation)
    fleet = load_fleet_or_exit(settings)
    rows = [_listed(fleet, entry) for entry in _entries(fleet, _places(settings))]
    if as_json:
        screen.print_json(rows)
        return
    columns = ("model", "pool", "family", "precision", "weight", "on disk", "digests", "state")
    shown = [
        (
            row["name"],
            row["pool"],
            row["family"],
            " ".join(filter(None, (row["precision"], row["quantize"]))),
            f"{row['traffic_weight']:g}",
            in_bytes(row["size_bytes"]),
            row["digests"] or "none",
            row["state"],
        )
        for row in rows
    ]
    screen.out().print(screen.table(columns, shown, numbers=("weight", "on disk", "digests")))


def _pools(fleet: Fleet, entry: _Entry) -> list[str]:
    return [pool for pool in fleet.pools if entry.name in fleet.checkpoints_in(pool)]


def _listed(fleet: Fleet, entry: _Entry) -> dict[str, Any]:
    """Return what is told of one version."""
    size_bytes = 0
    state = "complete"
    try:
        found = inspect(entry.path)
        size_bytes = found.size_bytes
        if found.missing:
            state = found.missing[0]
        elif entry.model.family not in (found.family, "plain", "pipeline"):
            state = f"looks like family {found.family}"
    except CheckpointCorrupt as problem:
        state = str(problem)
    if entry.is_remote:
        listed = entry.version.sha256
        here = sum((entry.path / name).is_file() for name in listed)
        if here < len(listed):
            state = f"{here} of {len(listed)} files are fetched"
    return {
        "name": entry.name,
        "pool": ", ".join(_pools(fleet, entry)),
        "family": entry.model.family,
        "precision": entry.model.of_version(entry.version.id).precision,
        "quantize": entry.version.quantize,
        "traffic_weight": entry.version.traffic_weight,
        "path": str(entry.path),
        "size_bytes": size_bytes,
        "digests": len(entry.version.sha256),
        "adapters": len(entry.model.adapters),
        "state": state,
    }


@models.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")
@pass_installation
def du(installation: Installation, as_json: bool) -> None:
    """Tell what the models of fleet.toml take on disk, and how much of it is never read.

    Never read are other variants of the weights, pickles and whatever else lies in the folders.
    """
    settings = device_settings(installation)
    fleet = load_fleet_or_exit(settings)
    places = _places(settings)
    entries = _entries(fleet, places)
    rows = [_disk_use(entry) for entry in entries]
    for name, model in fleet.models.items():
        for adapter, told in model.adapters.items():
            size_bytes = _size_of(places.file_of(told))
            use = {"name": f"{name}, adapter {adapter}", "read_bytes": size_bytes}
            rows.append({**use, "unread_bytes": 0, "path": told.source})
    if as_json:
        screen.print_json(rows)
        return
    shown = [
        (row["name"], in_bytes(row["read_bytes"]), in_bytes(row["unread_bytes"]), row["path"])
        for row in rows
    ]
    listed = digests_in(wanted_of(fleet, {entry.name for entry in entries}))
    cache = Weights(settings).cache
    if cache is not None and (unlisted_bytes := cache.unlisted_bytes(listed)):
        name = "cache, of no model or incomplete"
        shown.append((name, "", in_bytes(unlisted_bytes), str(cache.folder)))
    total_read = sum(row["read_bytes"] for row in rows)
    total_unread = sum(row["unread_bytes"] for row in rows)
    shown.append(("all", in_bytes(total_read), in_bytes(total_unread), ""))
    columns = ("model", "read", "never read", "where")
    screen.out().print(screen.table(columns, shown, numbers=("read", "never read")))


def _places(settings: DeviceSettings) -> Places:
    return Places(settings.checkpoint_root, settings.model_cache_dir)


def _disk_use(entry: _Entry) -> dict[str, Any]:
    try:
        names = files_read(entry.path, part_names(entry.model.family, entry.path))
    except CheckpointCorrupt:
        names = []
    read_bytes = sum(_size_of(entry.path / name) for name in names)
    all_bytes = sum(_size_of(file) for file in entry.path.rglob("*")) if names else 0
    return {
        "name": entry.name,
        "read_bytes": read_bytes,
        "unread_bytes": all_bytes - read_bytes,
        "path": str(entry.path),
    }


def _size_of(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
