"""Define `estimate`: say what a job would cost and when it would be done."""

from typing import Any

import click
from rich.table import Table

from cli import screen
from cli.installation import Installation, pass_installation
from cli.job_options import job_options
from darkroom_client import Estimate

_COLUMNS = (
    "tier",
    "model",
    "size",
    "steps",
    "guidance",
    "sampler",
    "n",
    "Mpx-steps",
    "gpu-seconds",
    "price",
    "ahead",
    "ready in s",
)


@click.command()
@click.argument("prompt")
@job_options
@click.option("--json", "as_json", is_flag=True, help="The estimate as the API tells it.")
@pass_installation
@click.pass_context
def estimate(
    ctx: click.Context, installation: Installation, /, prompt: str, as_json: bool, **fields: Any
) -> None:
    """Estimate the cost and the duration of a job for PROMPT.

    Exit code 1 if the job would be refused now.
    """
    with installation.client() as client:
        found = client.estimate(prompt, **fields)
    if as_json:
        screen.print_json(found.members)
    else:
        screen.out().print(_table(found))
        for warning in found.warnings:
            screen.warn(warning.detail)
    if not found.can_be_served:
        why = f": {found.refusal.detail}" if found.refusal else ""
        screen.complain(f"It would be refused now{why}")
        ctx.exit(1)


def _table(found: Estimate) -> Table:
    cost, queue = found.cost, found.queue
    price = (cost.gpu_seconds, f"{cost.amount} {cost.currency}") if cost else (None, None)
    place = (
        (queue.jobs_ahead, f"{queue.eta_p50_s:.1f} to {queue.eta_p90_s:.1f}")
        if queue and queue.eta_p50_s is not None
        else (None, None)
    )
    what = (found.tier, f"{found.model} {found.model_version}", found.size)
    how = (found.steps, found.guidance, found.sampler, found.n, found.megapixel_steps)
    return screen.table(_COLUMNS, [(*what, *how, *price, *place)], numbers=_COLUMNS[6:9])
