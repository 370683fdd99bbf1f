"""jobs, cancel: the tenant's jobs over HTTP."""

import itertools

import click

from cli import screen
from cli.installation import Installation, pass_installation

_STATES = ["queued", "running", "storing", "succeeded", "failed", "rejected", "canceled", "expired"]
_PROMPT_CHARS = 48


@click.command()
@click.option("--state", type=click.Choice(_STATES), help="Only jobs in this state.")
@click.option("--limit", type=click.IntRange(1), default=20, show_default=True, help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="The jobs as the API tells them.")
@pass_installation
def jobs(installation: Installation, state: str | None, limit: int, as_json: bool) -> None:
    """List the tenant's jobs, newest first."""
    with installation.client() as client:
        found = list(itertools.islice(client.jobs(state=state, page_size=min(limit, 100)), limit))
    if as_json:
        screen.print_json([job.members for job in found])
        return
    rows = [
        (job.id, job.created_at, job.state, job.tier, job.steps, job.n, job.seed, job.timing.total_s, _shortened(job.prompt))
        for job in found
    ]
    columns = ["job", "created (UTC)", "state", "tier", "steps", "n", "seed", "total s", "prompt"]
    screen.out().print(screen.table(columns, rows, numbers=["steps", "n", "total s"]))


@click.command()
@click.argument("job_id")
@pass_installation
def cancel(installation: Installation, job_id: str) -> None:
    """Cancel a job; an image under way stops at its next step."""
    with installation.client() as client:
        job = client.cancel(job_id)
    screen.out().print(f"job {job.id} is {job.state}")


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _PROMPT_CHARS else f"{line[: _PROMPT_CHARS - 1]}…"
