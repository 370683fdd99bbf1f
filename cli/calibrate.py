"""Define `calibrate`: measure how long a step takes on this device, by rows."""

import click

from cli import screen
from cli.installation import Installation, NoInstallation, pass_installation


@click.command()
@click.argument("model")
@click.option(
    "--repeats",
    type=click.IntRange(1, 100),
    default=5,
    show_default=True,
    help="Measurements of each size of forward.",
)
@pass_installation
def calibrate(installation: Installation, model: str, repeats: int) -> None:
    """Measure MODEL's forwards on this machine's device, and store the curve that workers then
    batch by.

    Nothing else should run on the device meanwhile. A worker without a curve for its device
    measures a shorter one at every start.
    """
    try:
        from engine import calibrate as engine_calibrate
        from engine.errors import EngineError
    except ModuleNotFoundError as error:
        where = "docker compose run --rm worker darkroom calibrate MODEL"
        raise NoInstallation(
            f"`darkroom calibrate` works where the engine is "
            f"({error.name} is not installed here): {where}."
        ) from None
    from settings import DeviceSettings, load, load_fleet_or_exit
    from tasks.engines import checkpoint_specs, engine_config

    settings = load(DeviceSettings)
    if installation.fleet_file is not None:
        settings = settings.model_copy(update={"fleet_file": installation.fleet_file})
    folder = settings.curves_folder or installation.data_dir / "curves"
    fleet = load_fleet_or_exit(settings)
    if model not in fleet.models:
        raise click.BadParameter(
            f"{model!r} is none of {', '.join(fleet.models)}", param_hint="MODEL"
        )
    config = engine_config(
        settings, fleet, fleet.pools[fleet.pool_of(model)], warm_up_repeats=repeats
    )
    for spec in checkpoint_specs(fleet, [model], settings.checkpoint_root):
        with screen.err().status(f"measuring {spec.name} on {config.device}"):
            try:
                file, points = engine_calibrate.calibrate(config, spec, folder)
            except EngineError as problem:
                raise click.ClickException(f"{spec.name}: {problem}") from None
        rows = []
        for point in points:
            size = f"{point.width_px}x{point.height_px}"
            worth_it = "yes" if point.grows else "no"
            rows.append(
                (size, point.rows, f"{point.step_s * 1000:.1f}", f"{point.gain:.2f}", worth_it)
            )
        columns = ("size", "rows", "ms a step", "images/s against one row", "worth growing to")
        screen.out().print(
            screen.table(
                columns, rows, title=f"{spec.name} on {config.device}", numbers=columns[1:4]
            )
        )
        screen.out().print(f"stored in {file}")
