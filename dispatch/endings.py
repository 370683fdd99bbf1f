"""Publish the end of a job, whatever ended it, and drop what was kept for it.

    run_ending       runs a transaction that may end a job, and notify_ended if it has
    notify_ended     for callers that have committed a final state themselves
    notify_erased    the same for a job whose content was deleted
    lose_hand_off    handles lost pixels, for results workers and the sweeper

All of it comes after the commit and is best effort, for Postgres has the truth. If it fails, others
make up for it: a worker drops a job that is not its own at its next renewal, a client that waits
for the job reads it again, and the sweeper drops what is left of it within a minute.
"""

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import structlog
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from dispatch.release import Release
from edges import telemetry
from edges.handoff import Handoff, HandoffUnavailable
from edges.inputs import Inputs
from edges.progress import JobSignals
from edges.snapshots import Snapshots, SnapshotsUnavailable
from models import leases
from models.database import run_transaction
from models.tables import Job
from policy.states import FINAL_STATES, JobState

log = structlog.get_logger(__name__)


@dataclass(frozen=True, kw_only=True)
class EndedJobs:
    """Publishes the end of jobs and drops what was kept for them; one per process.

    No method raises because Redis is away.
    """

    signals: JobSignals
    handoff: Handoff
    snapshots: Snapshots
    inputs: Inputs

    @classmethod
    def connect(
        cls,
        handoff_url: str,
        *,
        ttl_s: int,
        signals: JobSignals | None = None,
        handoff: Handoff | None = None,
    ) -> Self:
        """Make it with clients of the hand-off's Redis; each connects at its first command.

        ttl_s: seconds that pixels, snapshots and pictures are kept. signals, handoff: clients that
        the process has already.
        """
        return cls(
            signals=signals or JobSignals(handoff_url),
            handoff=handoff or Handoff(handoff_url, ttl_s=ttl_s),
            snapshots=Snapshots(handoff_url, ttl_s=ttl_s),
            inputs=Inputs(handoff_url, ttl_s=ttl_s),
        )

    def run_ending(self, database: Engine, change: Callable[[Session], Job | None]) -> Job | None:
        """Run `change` as a transaction and return its job; tell if that has ended by it.

        change: returns the job that it changed; None if it changed nothing.
        """
        job = run_transaction(database, change)
        if job is not None and job.state in FINAL_STATES:
            self.notify_ended(job)
        return job

    def notify_ended(self, job: Job) -> None:
        """Tell that the job is in a final state; drop its snapshots and the pictures it began from.

        The worker that may still render it is told to stop: it may have been canceled, erased or
        failed under way.  Harmless when repeated.
        """
        if job.has_just_ended:  # not when a cancel is repeated, or an ended job erased
            job.has_just_ended = False
            telemetry.JOBS_ENDED.labels(job.tier, job.model, job.state).inc()
        if job.attempt and job.state != JobState.SUCCEEDED:
            self.signals.publish_cancel(job.id)
        self.signals.publish_ending(job.id)
        self._drop_what_it_began_from(job.id)

    def notify_erased(self, job: Job) -> None:
        """Tell as `notify_ended` does; drop its pixels and the record of its progress as well.

        job: with its images.
        """
        self.notify_ended(job)
        for image in job.images:
            for attempt in {image.handed_off_attempt or job.attempt, job.attempt}:
                self.handoff.drop(job.id, image.index, attempt)
        self.signals.forget(job.id)

    def _drop_what_it_began_from(self, job_id: uuid.UUID) -> None:
        try:
            self.snapshots.drop([job_id])
            self.inputs.drop([job_id])
        except (SnapshotsUnavailable, HandoffUnavailable) as error:
            log.info("snapshots_not_dropped", job_id=str(job_id), reason=str(error))


def lose_hand_off(
    database: Engine,
    ended: EndedJobs,
    job_id: uuid.UUID,
    gone: Sequence[int],
    *,
    attempt_of: Mapping[int, int],
    release: Release | None = None,
) -> Job | None:
    """Have the images `gone` rendered again, for their pixels are; None if they were stored.

    The job fails, and that is told, if it has lost the pixels of one image too often.

    attempt_of: the attempt whose pixels were looked for, by index.  release: announces what has
    room now; None: the caller has all its queues looked at anyway.
    """
    job = ended.run_ending(
        database,
        lambda session: leases.lose_hand_off(session, job_id, gone, attempt_of=attempt_of),
    )
    if job is not None and release is not None:
        release.release(job.pool, job.tier)
    return job
