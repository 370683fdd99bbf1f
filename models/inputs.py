"""Stage the pictures that jobs start from: choose whose come next, and note which have come.

A job that starts from pictures lacks them until a task has put them into the hand-off. Until then
it is not announced, so it holds no slot, no memory and no place in the front queue, and jobs that
need no picture pass it. Of each (pool, tier) only so many jobs have their pictures asked for or
staged, in fair order: pictures are large, and the hand-off is small.
"""

import uuid
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import ColumnElement, case, func, text, update
from sqlalchemy.orm import Session

from models.database import statement_time
from models.tables import Job
from policy.params import pictures_of
from policy.states import JobState

OF_EACH_TENANT = 2  # that has none asked for, while the others' fill the window
# For pictures past the start deadline, where the job has no run deadline to go by.
LONGEST_WAIT_S = 3600.0

# The first `most` jobs in fair order; beyond them, up to twice as many, a few of each tenant that
# has none among them. Written so that it takes a few steps in the indexes, however many wait.
_ASK = text(
    """
    WITH asked AS MATERIALIZED (
        SELECT tenant_id, count(*) AS jobs FROM jobs
        WHERE pool = :pool AND tier = :tier AND state = 'queued' AND inputs_asked_at IS NOT NULL
        GROUP BY tenant_id
    ), total AS MATERIALIZED (
        SELECT coalesce(sum(jobs), 0)::bigint AS jobs FROM asked
    ), line AS (
        SELECT id FROM jobs
        WHERE pool = :pool AND tier = :tier AND state = 'queued' AND lacks_inputs
              AND inputs_asked_at IS NULL
        ORDER BY release_tag, id LIMIT greatest(0, :most - (SELECT jobs FROM total))
    ), heads AS (
        SELECT head.id FROM flows f CROSS JOIN LATERAL (
            SELECT id, release_tag FROM jobs j
            WHERE j.pool = :pool AND j.tier = :tier AND j.tenant_id = f.tenant_id
                  AND j.state = 'queued' AND j.lacks_inputs AND j.inputs_asked_at IS NULL
            ORDER BY j.release_tag, j.id LIMIT :of_each
        ) head
        WHERE (SELECT jobs FROM total) >= :most
              AND f.pool = :pool AND f.tier = :tier AND f.queued_jobs > 0
              AND NOT EXISTS (SELECT FROM asked WHERE asked.tenant_id = f.tenant_id)
        ORDER BY head.release_tag, head.id
        LIMIT greatest(0, 2 * :most - (SELECT jobs FROM total))
    )
    UPDATE jobs SET inputs_asked_at = clock_timestamp()
    WHERE id = ANY(ARRAY(SELECT id FROM line UNION ALL SELECT id FROM heads))
          AND state = 'queued' AND lacks_inputs
    RETURNING id
    """
)

_LACKING = text(
    """
    SELECT name FROM unnest(CAST(:tiers AS text[])) name CROSS JOIN LATERAL (
        SELECT FROM jobs
        WHERE pool = :pool AND tier = name AND state = 'queued' AND lacks_inputs
        ORDER BY release_tag, id LIMIT 1
    ) lacking
    """
)

_ASKED_AND_LACKING = text(
    """
    SELECT pool, tier, count(*) FROM jobs
    WHERE state = 'queued' AND inputs_asked_at IS NOT NULL AND lacks_inputs GROUP BY pool, tier
    """
)

_OLDEST_ASKED = text(
    """
    SELECT id FROM jobs
    WHERE pool = :pool AND state = 'queued' AND inputs_asked_at IS NOT NULL AND lacks_inputs
    ORDER BY id LIMIT 1
    """
)

_LACKING_BY_FLOW = text(
    """
    SELECT tier, tenant_id, count(*), sum(predicted_s) FROM jobs
    WHERE pool = :pool AND state = 'queued' AND lacks_inputs GROUP BY tier, tenant_id
    """
)


class MissingInputs(NamedTuple):
    """Jobs of a flow that lack their pictures; `queued_s` is device seconds."""

    jobs: int
    queued_s: float


class InputsArrival(NamedTuple):
    """A job whose pictures have come, and how long after they were last asked for."""

    pool: str
    tier: str
    waited_s: float


def ask(session: Session, *, pool: str, tier: str, most: int) -> list[uuid.UUID]:
    """Stamp the next jobs of (pool, tier) whose pictures are to be brought; return their ids.

    As many as leave `most` asked for, or staged and not yet taken. A tenant that has none among
    them gets a few in beyond that. To be called by one caller at a time, as `releasing.pick` sees
    to.
    """
    given = {"pool": pool, "tier": tier, "most": most, "of_each": OF_EACH_TENANT}
    return list(session.scalars(_ASK, given))


def ask_again(session: Session, *, pool: str, tier: str, asked_before_s: float) -> list[uuid.UUID]:
    """Stamp anew the jobs whose pictures were asked for that long ago and have not come.

    Returns their ids.
    """
    long_ago = statement_time() - func.make_interval(0, 0, 0, 0, 0, 0, asked_before_s)
    is_late = (
        Job.state == JobState.QUEUED,
        Job.inputs_asked_at < long_ago,
        Job.inputs_asked_at.is_not(None),
        Job.lacks_inputs,
    )
    statement = (
        update(Job)
        .where(Job.pool == pool, Job.tier == tier, *is_late)
        .values(inputs_asked_at=func.clock_timestamp())
    )
    return list(
        session.scalars(statement.returning(Job.id).execution_options(synchronize_session=False))
    )


def forget_asking(session: Session, job_ids: Sequence[uuid.UUID]) -> None:
    """Take the stamp back, for no task could be asked to bring the pictures."""
    lacking = (Job.state == JobState.QUEUED, Job.lacks_inputs)
    session.execute(update(Job).where(Job.id.in_(job_ids), *lacking).values(inputs_asked_at=None))


def note_brought(session: Session, job_id: uuid.UUID) -> InputsArrival | None:
    """Note that the job's pictures are in the hand-off, so that it may be announced.

    None if it does not wait for them.
    """
    asked_at = func.coalesce(Job.inputs_asked_at, func.clock_timestamp())
    waited = func.extract("epoch", func.clock_timestamp() - asked_at)
    statement = (
        update(Job)
        .where(Job.id == job_id, Job.state == JobState.QUEUED, Job.lacks_inputs)
        .values(
            lacks_inputs=False,
            inputs_asked_at=asked_at,
            # From now on it may wait as long as any other job may.
            start_by=func.greatest(
                Job.start_by, func.clock_timestamp() + (Job.start_by - Job.accepted_at)
            ),
        )
        .returning(Job.pool, Job.tier, waited)
        .execution_options(synchronize_session=False)
    )
    row = session.execute(statement).one_or_none()
    return InputsArrival(row[0], row[1], float(row[2])) if row is not None else None


def lose(job: Job) -> None:
    """Note that the pictures that the job starts from, if any, are not in the hand-off.

    They are to be brought again before the job is announced.
    """
    job.lacks_inputs = bool(pictures_of(job))
    job.inputs_asked_at = None


def tiers_lacking(session: Session, *, pool: str, tiers: Sequence[str]) -> frozenset[str]:
    """Return those of the tiers in which a job of the pool lacks its pictures."""
    return frozenset(session.scalars(_LACKING, {"pool": pool, "tiers": list(tiers)}))


def oldest_asked(session: Session, *, pool: str) -> uuid.UUID | None:
    """Find the oldest job of the pool whose pictures were asked for and have not come.

    None if there is none.
    """
    oldest: uuid.UUID | None = session.scalar(_OLDEST_ASKED, {"pool": pool})
    return oldest


def lacking_by_flow(session: Session, *, pool: str) -> dict[tuple[str, uuid.UUID], MissingInputs]:
    """Count the jobs of the pool that lack their pictures, by tier and tenant.

    Reads them all, so it is meant for times when no pictures come.
    """
    rows = session.execute(_LACKING_BY_FLOW, {"pool": pool})
    return {
        (tier, tenant_id): MissingInputs(jobs, queued_s) for tier, tenant_id, jobs, queued_s in rows
    }


def asked_and_lacking(session: Session) -> Mapping[tuple[str, str], int]:
    """Count jobs whose pictures were asked for and have not come, by (pool, tier)."""
    return {(pool, tier): int(jobs) for pool, tier, jobs in session.execute(_ASKED_AND_LACKING)}


def start_deadline() -> ColumnElement[datetime]:
    """Return SQL for the instant by which a job must start, or it expires.

    While its pictures are being brought it may wait for them, from its deadline on, as long as it
    may run.
    """
    seconds = case(
        (
            Job.lacks_inputs & Job.inputs_asked_at.is_not(None),
            func.coalesce(Job.run_within_s, LONGEST_WAIT_S),
        ),
        else_=0.0,
    )
    return Job.start_by + func.make_interval(0, 0, 0, 0, 0, 0, seconds)
