"""What the commands of `models` share: paths, settings, inspections and digests, as errors of the
command line.
"""

import json
import os
import re
from pathlib import Path
from typing import Any, cast, get_args

import click
from dotenv import dotenv_values

from cli import screen
from cli.installation import Installation
from engine.errors import CheckpointCorrupt
from engine.folders import files_read, part_names, sha256_of
from engine.inspection import Inspection, inspect
from policy.fleet import Family, Fleet, FleetInvalid, Model, parse_fleet
from policy.proposals import CheckpointFacts
from settings import DeviceSettings, SettingsInvalid, read

REMOTE = ("s3://", "hf:")


class LocalPath(click.Path):
    """A path on this machine; addresses of elsewhere are refused with what to do instead."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if str(value).startswith(REMOTE):
            reason = "`models add` and `models pull` fetch it"
            self.fail(f"{value} is no path of this machine: {reason}", param, ctx)
        path = Path(str(super().convert(value, param, ctx)))
        if not path.exists():
            self.fail(f"{value} is not there", param, ctx)
        return path


LOCAL = LocalPath(path_type=Path)


def device_variables(installation: Installation) -> dict[str, str]:
    """Return the variables of whoever loads weights: of the environment, else of this stack."""
    names = {name.upper() for name in DeviceSettings.model_fields}
    kept = {
        name: value
        for name, value in dotenv_values(installation.data_dir / "env", interpolate=False).items()
        if value is not None and name.removesuffix("_FILE") in names
    }
    data_dir = installation.data_dir.absolute()
    own = {
        "CURVES_FOLDER": str(data_dir / "curves"),
        "MODEL_CACHE_DIR": str(data_dir / "weights"),
    }
    return {**own, **kept, **os.environ}


def device_settings(installation: Installation) -> DeviceSettings:
    """Read the settings of whoever loads weights. Raises click.ClickException."""
    try:
        settings = read(DeviceSettings, device_variables(installation))
    except SettingsInvalid as error:
        raise click.ClickException(f"settings: {'; '.join(error.problems)}") from None
    if installation.fleet_file is not None:
        settings = settings.model_copy(update={"fleet_file": installation.fleet_file})
    return settings


def fleet_and_text(settings: DeviceSettings) -> tuple[Fleet, str]:
    """Return what fleet.toml says, and its text. Raises click.ClickException."""
    file = settings.fleet_file
    try:
        text = file.read_text("utf-8")
        return parse_fleet(text), text
    except OSError as error:
        raise click.ClickException(f"{file}: {error.strerror}") from None
    except FleetInvalid as error:
        raise click.ClickException(f"{file}: {'; '.join(error.problems)}") from None


def models_named(fleet: Fleet, model: str | None) -> dict[str, Model]:
    """Return this model of the fleet, or all. Raises click.BadParameter."""
    if model is None:
        return dict(fleet.models)
    if model not in fleet.models:
        known = ", ".join(fleet.models)
        raise click.BadParameter(f"{model!r} is none of {known}", param_hint="MODEL")
    return {model: fleet.models[model]}


def facts_of(found: Inspection) -> CheckpointFacts:
    """Return what decides a checkpoint's defaults. Raises click.ClickException where unknown."""
    if found.family not in get_args(Family):
        raise click.ClickException(f"{found.path}: {found.title}: nobody knows its family")
    return CheckpointFacts(
        family=cast(Family, found.family),
        pipeline_class=found.pipeline_class,
        scheduler=found.scheduler,
        few_steps=found.few_steps,
        guidance_distilled=found.guidance_distilled is not False,
        only_repaints=found.only_repaints,
        native_side_px=found.native_side_px,
    )


def looked_at(path: Path) -> Inspection:
    """Inspect a path. Raises click.ClickException, which names the file and the way out."""
    try:
        return inspect(path)
    except CheckpointCorrupt as problem:
        raise click.ClickException(str(problem)) from None


def digests_of(found: Inspection) -> dict[str, str]:
    """Hash every file of a checkpoint that is read. Raises click.ClickException."""
    try:
        names = files_read(found.path, part_names(found.family, found.path))
    except CheckpointCorrupt as problem:
        raise click.ClickException(str(problem)) from None
    with screen.err().status("hashing"):
        return {name: hashed(found.path / name) for name in names}


def hashed(file: Path) -> str:
    """Return a file's sha256. Raises click.ClickException."""
    try:
        return sha256_of(file)
    except CheckpointCorrupt as problem:
        raise click.ClickException(str(problem)) from None


def in_bytes(count: float) -> str:
    """Write a number of bytes for people, in powers of 1024."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"


def check_name(name: str) -> None:
    """Raise click.BadParameter for what cannot be a model's name."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}", name):
        reason = f"{json.dumps(name)}: a name has letters, digits, '.', '_' and '-'"
        raise click.BadParameter(reason, param_hint="NAME")
