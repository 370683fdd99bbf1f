"""Define `models pull`, and fetch what `models add` is given from elsewhere."""

from pathlib import Path
from tempfile import TemporaryDirectory

import click

from cli import screen
from cli.checkpoints import device_settings, models_named
from cli.installation import Installation, pass_installation
from edges.weightsources import WeightsError, open_folder
from engine.errors import CheckpointCorrupt
from engine.folders import INDEX, classes_of, read_files, read_index
from policy.fleet import checkpoint_name
from policy.sources import RemoteSource, is_fetched
from settings import DeviceSettings, load_fleet_or_exit
from tasks.weights import Weights, wanted_of


@click.command()
@click.argument("model", required=False)
@pass_installation
@click.pass_context
def pull(ctx: click.Context, installation: Installation, model: str | None) -> None:
    """Fetch the weights of MODEL, or of every model of fleet.toml, from S3 or the hub.

    Into the cache that the workers of this machine use, so that they need not wait. Exit code 1 if
    a version cannot be fetched; the others are.
    """
    settings = device_settings(installation)
    fleet = load_fleet_or_exit(settings)
    names = {
        checkpoint_name(name, version.id)
        for name, entry in models_named(fleet, model).items()
        for version in entry.versions
    }
    wanted = wanted_of(fleet, names)
    if not wanted:
        click.echo("all of these weights lie on this machine")
    with screen.err().status("fetching") as status:
        absent = Weights(settings, tell=status.update).stage(wanted)
    for name in wanted:
        if name in absent:
            screen.complain(f"{name}: {absent[name]}")
        else:
            click.echo(f"{name}: is here")
    ctx.exit(1 if absent else 0)


def fetched(
    settings: DeviceSettings, source: RemoteSource, name: str
) -> tuple[Path, dict[str, str]]:
    """Fetch what is read of a checkpoint of which no digests are known; return folder and digests.

    name: of the source, for people.  Raises click.ClickException.
    """
    with screen.err().status("fetching") as status:
        cache = Weights(settings, tell=status.update).cache
        assert cache is not None, "these settings have a folder for it"
        folder = open_folder(source, settings)
        try:
            names = [each for each in folder.names() if is_fetched(each)]
            if INDEX not in names:
                raise WeightsError(f"{name}: holds no {INDEX}: it is no folder of diffusers")
            digests = {INDEX: cache.fetch_unlisted(folder, INDEX)}
            wanted = _read_of(names, cache.bring(folder, digests) / INDEX)
            digests |= {each: cache.fetch_unlisted(folder, each) for each in wanted}
            return cache.bring(folder, digests), digests
        except (WeightsError, CheckpointCorrupt) as problem:
            raise click.ClickException(str(problem)) from None
        except OSError as problem:  # also of names that no folder of this machine can have
            file = str(problem.filename or cache.folder)[-100:]
            raise click.ClickException(f"{name}: {file}: {problem.strerror}") from None


def _read_of(names: list[str], index: Path) -> list[str]:
    """Name those of a checkpoint's files that are read: one variant of the weights of each part.

    Raises CheckpointCorrupt.
    """
    with TemporaryDirectory(prefix="darkroom-names-") as place:
        for name in names:
            file = Path(place) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()
        parts = sorted(classes_of(read_index(index.parent)))
        return [f"{part}/{file.name}" for part in parts for file in read_files(Path(place, part))]
