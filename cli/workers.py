"""Define `workers`: let workers be started again on devices that were lost."""

import socket

import click

from cli import screen
from cli.fleet import user_name
from cli.installation import Installation, pass_installation


@click.group()
def workers() -> None:
    """Let workers be started on devices that are quarantined."""


@workers.command()
@click.argument("name", metavar="DEVICE|WORKER")
@pass_installation
@click.pass_context
def release(ctx: click.Context, installation: Installation, name: str) -> None:
    """Have workers started again on a device that was lost twice.

    Name the device, as `darkroom sql "SELECT worker, device, problem FROM workers_now WHERE state =
    'quarantined'"` does, or the worker that was on it. The launcher of its host starts one within
    seconds. Losses until now count no more.
    """
    from models import quarantine

    actor = f"{user_name()}@{socket.gethostname()}"
    with installation.transaction() as session:
        released = quarantine.release(session, name, actor=actor)
        told = [f"device {each.device} of host {each.host} is released" for each in released]
    if not told:
        screen.complain(f"No device is quarantined that is called {name!r}, or whose worker is.")
        ctx.exit(4)
    for line in told:
        screen.out().print(line, soft_wrap=True)
