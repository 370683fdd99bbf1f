"""Define `calibrate`: measure how long a step takes on this device, by rows."""

from pathlib import Path
from typing import TYPE_CHECKING

import click

from cli import screen
from cli.installation import Installation, NoInstallation, pass_installation

if TYPE_CHECKING:
    from engine.calibrate import CurvePoint
    from engine.config import CheckpointSpec, EngineConfig

_COLUMNS = ("size", "rows", "ms a step", "images/s against one row", "worth growing to")


@click.command()
@click.argument("model")
@click.option(
    "--repeats",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    help="Measurements of each batch size.",
)
@pass_installation
def calibrate(installation: Installation, model: str, repeats: int) -> None:
    """Measure how fast MODEL runs on this machine's device, by batch size.

    Workers choose their batches by the stored result. Nothing else should run on the device
    meanwhile. A worker without a result for its device makes a shorter measurement at each start.
    """
    _require_engine()
    from cli.checkpoints import device_settings
    from settings import load_fleet_or_exit
    from tasks.engines import engine_config, staged_specs
    from tasks.weights import Weights

    settings = device_settings(installation)
    assert settings.curves_folder is not None, "there is a default"
    fleet = load_fleet_or_exit(settings)
    if model not in fleet.models:
        raise click.BadParameter(
            f"{model!r} is not one of {', '.join(fleet.models)}", param_hint="MODEL"
        )
    pool = fleet.pools[fleet.pools_of(model)[0]]
    config = engine_config(settings, fleet, pool, warm_up_repeats=repeats)
    for spec in staged_specs(fleet, [model], settings, Weights(settings)):
        _measure(config, spec, settings.curves_folder)


def _require_engine() -> None:
    """Raise NoInstallation where the engine cannot be imported."""
    try:
        import engine.calibrate  # noqa: F401
    except ModuleNotFoundError as error:
        where = "docker compose run --rm worker darkroom calibrate MODEL"
        raise NoInstallation(
            f"`darkroom calibrate` works where the engine is "
            f"({error.name} is not installed here): {where}."
        ) from None


def _measure(config: "EngineConfig", spec: "CheckpointSpec", folder: Path) -> None:
    """Measure one checkpoint, store its curve in `folder` and print it."""
    from engine import calibrate as engine_calibrate
    from engine.errors import EngineError

    with screen.err().status(f"measuring {spec.name} on {config.device}"):
        try:
            file, points = engine_calibrate.calibrate(config, spec, folder)
        except EngineError as problem:
            raise click.ClickException(f"{spec.name}: {problem}") from None
    title = f"{spec.name} on {config.device}"
    rows = [_row(point) for point in points]
    screen.out().print(screen.table(_COLUMNS, rows, title=title, numbers=_COLUMNS[1:4]))
    screen.out().print(f"stored in {file}")


def _row(point: "CurvePoint") -> tuple[object, ...]:
    return (
        f"{point.width_px}x{point.height_px}",
        point.rows,
        f"{point.step_s * 1000:.1f}",
        f"{point.gain:.2f}",
        "yes" if point.grows else "no",
    )
