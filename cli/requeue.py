"""Define `requeue`: retry a failed job of any tenant, over SQL."""

import uuid

import click

from cli import screen
from cli.installation import Installation, pass_installation
from models import jobs
from models.files import FileGone

START_WITHIN_S = 86_400.0  # an operator is in less of a hurry than the tenant was


@click.command()
@click.argument("job_id", type=click.UUID)
@pass_installation
@click.pass_context
def requeue(ctx: click.Context, installation: Installation, job_id: uuid.UUID) -> None:
    """Create a new job with the parameters and seeds of a failed one.

    It belongs to the same tenant. The failed job stays as it is. `darkroom sql "select * from
    dead_letters"` lists failed jobs.
    """
    try:
        with installation.transaction() as session:
            job = jobs.requeue_dead(
                session, job_id, start_within_s=START_WITHIN_S, actor="operator"
            )
    except FileGone as error:
        screen.complain(
            f"Job {job_id} starts from file {error.file_id}, which its tenant has deleted."
        )
        ctx.exit(4)
    except jobs.JobAlreadyFinished:
        screen.complain(
            f"Job {job_id} was requeued before; the column requeued_as of dead_letters names the"
            " new job."
        )
        ctx.exit(4)
    if job is None:
        screen.complain(f"There is no failed job {job_id}.")
        ctx.exit(4)
    screen.out().print(
        f"job {job.id} repeats job {job_id}; the sweeper releases it within seconds",
        soft_wrap=True,
    )
