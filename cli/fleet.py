"""Define `fleet`: check fleet.toml, put it in force, and go back to an earlier one."""

import getpass
import os
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import screen
from cli.installation import Installation, NoInstallation, pass_installation
from policy.fleet import Fleet, FleetInvalid, checkpoint_name, parse_fleet
from policy.residency import too_large
from policy.revisions import Fate, QueuedKind, changes, decide

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from models.tables import FleetRevision

file_argument = click.argument(
    "file", type=click.Path(path_type=Path, dir_okay=False), required=False
)


@click.group()
def fleet() -> None:
    """Check fleet.toml, put it in force, and go back to an earlier revision."""


@fleet.command()
@file_argument
@pass_installation
def check(installation: Installation, file: Path | None) -> None:
    """Check FILE, by default the installation's fleet.toml. Nothing is changed.

    Where the installation's database can be reached, names of tenants are compared with it.
    """
    _, found = _read(installation, file)
    _warn_if_a_database_is_there(installation, found)
    screen.out().print(
        f"nothing is wrong: {len(found.models)} models, {len(found.tiers)} tiers,"
        f" {len(found.pools)} pools"
    )


@fleet.command()
@file_argument
@pass_installation
def diff(installation: Installation, file: Path | None) -> None:
    """Show what `apply` would change, and what would become of queued jobs."""
    from models import revisions

    _, new = _read(installation, file)
    with installation.transaction() as session:
        revision = revisions.newest(session)
        if revision is None:
            screen.out().print("no revision is in force yet; everything would be new")
            return
        click.echo(f"against revision {revision.number}:")
        _show_changes(revision, new)
        _show_fates(session, new)
        _warn_of_unknown_tenants(session, new)


@fleet.command()
@file_argument
@click.option("--note", help="Why; kept in the history.")
@pass_installation
def apply(installation: Installation, file: Path | None, note: str | None) -> None:
    """Put FILE, by default the installation's fleet.toml, in force as a new revision.

    Every process follows within two seconds. A file with an error is refused as a whole.
    """
    content, new = _read(installation, file)
    _apply(installation, content, new, note=note)


@fleet.command()
@click.option("--limit", type=click.IntRange(1, 1000), default=20, show_default=True)
@pass_installation
def history(installation: Installation, limit: int) -> None:
    """List the revisions, the newest first; the first line is in force."""
    from models import revisions

    with installation.transaction() as session:
        found = revisions.history(session, most=limit)
        rows = [
            (
                revision.number,
                f"{revision.applied_at:%Y-%m-%d %H:%M:%S}",
                revision.actor,
                revision.sha256[:12],
                _note(revision.note, revision.rollback_of),
            )
            for revision in found
        ]
    columns = ["revision", "applied (UTC)", "by", "sha256", "note"]
    screen.out().print(screen.table(columns, rows, numbers=["revision"]))


@fleet.command()
@click.argument("number", type=click.IntRange(1))
@click.option("--note", help="Why; kept in the history.")
@pass_installation
def rollback(installation: Installation, number: int, note: str | None) -> None:
    """Put the text of revision NUMBER in force again, as a new revision.

    fleet.toml stays as it is: the next `apply` or `up` would put it in force again.
    """
    from models import revisions

    with installation.transaction() as session:
        try:
            content = revisions.find(session, number).content
        except revisions.NoRevision as error:
            raise click.UsageError(str(error)) from None
    _apply(installation, content, _parsed(f"revision {number}", content), note=note, of=number)


def _apply(
    installation: Installation,
    content: str,
    new: Fleet,
    *,
    note: str | None,
    of: int | None = None,
) -> None:
    from models import revisions

    actor = f"{user_name()}@{socket.gethostname()}"
    with installation.transaction() as session:
        before = revisions.newest(session)
        revision, is_new = revisions.apply(session, content, actor=actor, note=note, rollback_of=of)
        if not is_new:
            click.echo(f"revision {revision.number} is in force already; nothing was changed")
            return
        if before is not None:
            click.echo(f"against revision {before.number}:")
            _show_changes(before, new)
        _show_fates(session, new)
        _warn_of_unknown_tenants(session, new)
        number = revision.number
    click.echo(f"revision {number} is in force; every process follows within two seconds")


def user_name() -> str:
    """Name the user of this process; by number where the machine has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid-{os.getuid()}"


def _read(installation: Installation, file: Path | None) -> tuple[str, Fleet]:
    """Read and check the file. Raises click.ClickException, with one line per wrong key."""
    from settings import DeviceSettings, load

    settings = load(DeviceSettings).model_copy(update=installation.remembered())
    if file is None:
        file = settings.fleet_file
    try:
        content = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{file} cannot be read: {error}") from None
    found = _parsed(file.name, content)
    if problems := _too_large(found, settings.checkpoint_root):
        raise _refusal(file.name, problems)
    return content, found


def _too_large(fleet: Fleet, root: Path) -> list[str]:
    """Tell which versions a pool's budget does not hold; of those alone whose files are here."""
    problems = []
    for name, pool in fleet.pools.items():
        if pool.device_memory_gb is None:
            continue
        sizes = {}
        for model, version in fleet.versions_in(name):
            found = fleet.models[model].version(version)
            precision = fleet.models[model].of_version(version).precision
            sizes[checkpoint_name(model, version)] = _weights_bytes(
                root / found.source, precision, is_quantised=found.quantize is not None
            )
        problems += too_large(name, pool, sizes)
    return problems


def _weights_bytes(path: Path, precision: str, *, is_quantised: bool) -> int:
    """Tell the memory of a checkpoint's weights by its files' headers; 0 where they are not here.

    What is wrong with them is for `darkroom models verify` to say.
    """
    from engine.errors import CheckpointCorrupt
    from engine.inspection import inspect

    try:
        return inspect(path).weights_bytes(precision, is_quantised=is_quantised)
    except CheckpointCorrupt:
        return 0


def _parsed(name: str, content: str) -> Fleet:
    try:
        return parse_fleet(content)
    except FleetInvalid as error:
        raise _refusal(name, error.problems) from None


def _refusal(name: str, problems: Sequence[str]) -> click.ClickException:
    lines = "\n".join(f"{name}: {problem}" for problem in problems)
    return click.ClickException(f"nothing was changed\n{lines}")


def _show_changes(old: "FleetRevision", new: Fleet) -> None:
    try:
        found = changes(parse_fleet(old.content), new)
    except FleetInvalid as error:  # another release wrote it; the way out is to apply a new text
        click.echo("this release cannot read it, so what differs is not known:")
        for problem in error.problems:
            click.echo(f"  {problem}")
        return
    for change in found:
        click.echo(str(change))
    if not found:
        click.echo("the same fleet in other words")


def _show_fates(session: "Session", new: Fleet) -> None:
    """Say what becomes of the jobs that wait now, where it is not that they stay."""
    from models import revisions

    for line in _fates(revisions.queued_kinds(session).items(), new):
        click.echo(line)


def _warn_if_a_database_is_there(installation: Installation, new: Fleet) -> None:
    from sqlalchemy.exc import SQLAlchemyError

    if not any(pool.tenants for pool in new.pools.values()):
        return
    try:
        with installation.transaction() as session:
            _warn_of_unknown_tenants(session, new)
    except (NoInstallation, SQLAlchemyError):
        click.echo("no database is at hand: names of tenants were not checked", err=True)


def _warn_of_unknown_tenants(session: "Session", new: Fleet) -> None:
    """Warn of pools that are reserved for tenants that are not there, by a slip or not yet."""
    from models import tenants

    for name, pool in new.pools.items():
        for unknown in tenants.unknown_names(session, pool.tenants):
            click.echo(
                f"warning: pools.{name}.tenants: there is no tenant {unknown!r};"
                " `./darkroom tenants list` names them all",
                err=True,
            )


def _fates(queued: Iterable[tuple[QueuedKind, int]], new: Fleet) -> list[str]:
    """Tell by model and version what becomes of the queued jobs that do not stay."""
    jobs: Counter[str] = Counter()
    for kind, count in queued:
        decision = decide(kind, new)
        what = f"queued jobs of model {kind.model}, version {kind.model_version}"
        if decision.fate is Fate.FAILS:
            jobs[f"{what}: fail with {decision.code}, {decision.detail}"] += count
        elif decision.fate is Fate.MOVES:
            jobs[f"{what}: move from pool {kind.pool} to {decision.pool}"] += count
    return [f"{count} {line}" for line, count in jobs.items()]


def _note(note: str | None, rollback_of: int | None) -> str:
    told = f"back to {rollback_of}" if rollback_of is not None else ""
    return ": ".join(part for part in (told, note) if part)
