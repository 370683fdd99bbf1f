"""Define `jobs`, `watch`, `cancel` and `delete`: the tenant's jobs over HTTP."""

import itertools
import re
from datetime import UTC, datetime, timedelta

import click

from cli import screen, watching
from cli.generate import complain_of, timing_table, warn_of
from cli.installation import Installation, pass_installation
from darkroom_client import Job

_STATES = ["queued", "running", "storing", "succeeded", "failed", "rejected", "canceled", "expired"]
_PROMPT_CHARS = 48
_COLUMNS = ("job", "created (UTC)", "state", "tier", "steps", "n", "seed", "total s", "prompt")


@click.command()
@click.option("--state", type=click.Choice(_STATES), help="Only jobs in this state.")
@click.option(
    "--since",
    help="Only jobs from then on: 2026-11-26, 2026-11-26T18:00 (UTC), or 15m, 12h, 7d ago.",
)
@click.option("--until", help="Only jobs accepted before that instant.")
@click.option(
    "--metadata",
    multiple=True,
    metavar="KEY=VALUE",
    help="Only jobs with this metadata entry; repeat to require several.",
)
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="The most jobs to list."
)
@click.option("--json", "as_json", is_flag=True, help="Print the jobs as the API's JSON.")
@pass_installation
def jobs(
    installation: Installation,
    state: str | None,
    since: str | None,
    until: str | None,
    metadata: tuple[str, ...],
    limit: int,
    as_json: bool,
) -> None:
    """List the tenant's jobs, newest first."""
    from_at = _instant(since, "--since")
    to_at = _instant(until, "--until")
    pairs = _pairs(metadata)
    with installation.client() as client:
        listed = client.jobs(
            state=state,
            since=from_at,
            until=to_at,
            metadata=pairs,
            page_size=min(limit, 100),
        )
        found = list(itertools.islice(listed, limit))
    if as_json:
        screen.print_json([job.members for job in found])
    else:
        rows = [_row(job) for job in found]
        screen.out().print(screen.table(_COLUMNS, rows, numbers=["steps", "n", "total s"]))


def _row(job: Job) -> tuple[object, ...]:
    prompt = _shortened(job.prompt or "(erased)")
    asked = (job.tier, job.steps, job.n, job.seed)
    return (job.id, job.created_at, job.state, *asked, job.timing.total_s, prompt)


@click.command()
@click.argument("job_id")
@pass_installation
def cancel(installation: Installation, job_id: str) -> None:
    """Cancel a job. An image that is being made stops at its next step."""
    with installation.client() as client:
        job = client.cancel(job_id)
    screen.out().print(f"job {job.id} is {job.state}")


@click.command()
@click.argument("job_id")
@pass_installation
@click.pass_context
def watch(ctx: click.Context, installation: Installation, job_id: str) -> None:
    """Watch a job until it has ended.

    Ctrl-C ends the command; the job goes on. Exit code 1 if the job does not succeed.
    """
    with installation.client() as client:
        job = watching.watch(client, client.job(job_id), timeout_s=None, cancels=False)
    screen.out().print(f"job {job.id} is {job.state}")
    screen.out().print(timing_table(job))
    warn_of(job)
    if job.state != "succeeded":
        complain_of(job)
        ctx.exit(1)


@click.command()
@click.argument("job_id")
@click.confirmation_option(prompt="Its prompt and images cannot be brought back. Delete them?")
@pass_installation
def delete(installation: Installation, job_id: str) -> None:
    """Erase the prompt, metadata and images of a job.

    Its cost and its audit events stay.
    """
    with installation.client() as client:
        client.delete(job_id)
    screen.out().print(f"job {job_id} is erased")


def _instant(text: str | None, option: str) -> datetime | None:
    """Parse a typed time, or an age such as 12h. Raises click.BadParameter."""
    if text is None:
        return None
    if ago := re.fullmatch(r"(\d+)([mhd])", text):
        unit = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}[ago[2]]
        return datetime.now(UTC) - int(ago[1]) * unit
    try:
        at = datetime.fromisoformat(text)
    except ValueError:
        raise click.BadParameter(
            "write 2026-11-26, 2026-11-26T18:00, 15m, 12h or 7d", param_hint=option
        ) from None
    return at if at.tzinfo else at.replace(tzinfo=UTC)


def _pairs(texts: tuple[str, ...]) -> dict[str, str]:
    for text in texts:
        if "=" not in text:
            raise click.BadParameter(f"{text!r} is not KEY=VALUE", param_hint="--metadata")
    return dict(text.split("=", 1) for text in texts)


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _PROMPT_CHARS else f"{line[: _PROMPT_CHARS - 1]}…"
