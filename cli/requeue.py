"""Define `requeue`: retry a failed job of any tenant, over SQL."""

import uuid
from functools import partial

import click
from sqlalchemy.orm import Session

from cli import screen
from cli.installation import Installation, pass_installation
from models import jobs, revisions, workers
from models.files import FileGone
from models.jobs import Route
from models.tables import Job
from policy.fleet import FleetInvalid, parse_fleet
from policy.revisions import decide_again
from policy.routing import LivePool

START_WITHIN_S = 86_400.0  # an operator is in less of a hurry than the tenant was
WORKER_SILENCE_S = 15.0  # then it counts as gone, where several pools may make the job


class NotOffered(Exception):
    """The fleet in force does not offer what the job needs; the message says what."""


@click.command()
@click.argument("job_id", type=click.UUID)
@pass_installation
@click.pass_context
def requeue(ctx: click.Context, installation: Installation, job_id: uuid.UUID) -> None:
    """Create a new job with the parameters and seeds of a failed one.

    It belongs to the same tenant, and goes to the pool that the fleet in force has for it. The
    failed job stays as it is. `darkroom sql "select * from dead_letters"` lists failed jobs.
    """
    try:
        with installation.transaction() as session:
            job = jobs.requeue_dead(
                session,
                job_id,
                start_within_s=START_WITHIN_S,
                actor="operator",
                route=partial(_route, session),
            )
    except NotOffered as problem:
        screen.complain(
            f"Job {job_id} cannot be made: {problem}. Put it back first, as by `darkroom fleet"
            " rollback`."
        )
        ctx.exit(4)
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


def _route(session: Session, dead: Job) -> Route:
    """Choose the pool by the fleet in force, as for a new request. Raises NotOffered.

    A job of a process that goes by a file of its own stays where it was.
    """
    revision = revisions.newest(session)
    if revision is None or dead.fleet_revision is None:
        return Route(dead.pool, dead.fleet_revision)
    try:
        fleet = parse_fleet(revision.content)
    except FleetInvalid as error:
        problem = error.problems[0]
        raise NotOffered(
            f"this release cannot read revision {revision.number}: {problem}"
        ) from None

    def live(pool: str) -> LivePool:
        found = workers.capacity(session, pool=pool, silent_for_s=WORKER_SILENCE_S)
        return LivePool(found.devices, found.held)

    decision = decide_again(revisions.kind_of(session, dead), fleet, live)
    if decision.code is not None:
        raise NotOffered(decision.detail)
    return Route(decision.pool, revision.number)
