"""Bring a job's input pictures from the object store to the hand-off, in the job's size.

A GPU worker has no key to the store, so the results worker does it, before a GPU worker is asked:
the job is announced when the pictures are there.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray
from sqlalchemy import Engine as Database
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from dispatch.release import Release
from edges import telemetry
from edges.handoff import HandoffUnavailable
from edges.inputs import Inputs, PictureGone, StagedPicture
from edges.objectstore import ObjectGone, ObjectStore, StoreUnavailable
from edges.pictures import fitted, fitted_mask
from models import files, inputs, jobs
from models.database import transaction
from models.tables import Job
from policy import admission
from policy.params import PICTURES, pictures_of
from policy.states import JobState

log = structlog.get_logger(__name__)

_FIT: dict[str | None, Callable[[bytes, int, int], NDArray[np.uint8]]] = {
    "image": fitted,
    "mask": fitted_mask,
}  # by what kind of picture it is


@dataclass(frozen=True, kw_only=True)
class InputStager:
    """Stage input pictures; one per results worker."""

    database: Database
    inputs: Inputs
    store: ObjectStore
    release: Release
    fill: Callable[[], float]  # of the hand-off

    def stage_inputs(self, *, job_id: str) -> None:
        """Bring every picture of a job that lacks them, and release the job.

        Harmless when repeated. If it fails, the sweeper asks again.
        """
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(job_id=job_id)
        try:
            self._stage(uuid.UUID(job_id))
        except (StoreUnavailable, HandoffUnavailable, OperationalError, PoolTimeout) as error:
            log.warning("inputs_postponed", reason=f"{type(error).__name__}: {error}"[:300])
        except BaseException as error:
            log.error("stage_task_failed", exc_info=error)

    def _stage(self, job_id: uuid.UUID) -> None:
        with transaction(self.database) as session:
            job = jobs.find_without_texts(session, job_id)
        # A running job has them, unless its worker is of an older version, which asks for them
        # while it holds the lease.
        if job is None or not (
            job.state == JobState.RUNNING or (job.state == JobState.QUEUED and job.lacks_inputs)
        ):
            telemetry.DUPLICATES.labels("stage").inc()
            return
        if not self.inputs.are_there(job_id):
            self._bring(job)
        with transaction(self.database) as session:
            noted = inputs.note_brought(session, job_id)
        if noted is not None:
            telemetry.INPUT_WAIT_SECONDS.observe(noted.waited_s)
            self.release.release(noted.pool, noted.tier)

    def _bring(self, job: Job) -> None:
        """Put every picture of the job into the hand-off. Raises HandoffUnavailable."""
        if self.fill() > admission.HANDOFF_FULL_FOR_INPUTS:
            raise HandoffUnavailable("it has no room for pictures")
        brought = {
            role: self._picture(job, role, file_id) for role, file_id in pictures_of(job).items()
        }
        self.inputs.bring(job.id, brought)
        telemetry.INPUTS_BROUGHT.inc(len(brought))

    def _picture(self, job: Job, role: str, file_id: uuid.UUID) -> StagedPicture:
        with transaction(self.database) as session:
            file = files.find(session, file_id, tenant_id=job.tenant_id)
        if file is None:
            return self._gone(role, file_id, "was erased")
        try:
            content = self.store.get(file.object_key)
        except ObjectGone:
            return self._gone(role, file_id, "is not in the object store any more")
        return _FIT[PICTURES[role].picture](content, job.width_px, job.height_px)

    def _gone(self, role: str, file_id: uuid.UUID, what: str) -> PictureGone:
        telemetry.INPUTS_GONE.inc()
        log.error("input_gone", role=role, file_id=str(file_id))
        return PictureGone(f"{role}: file {file_id} {what}")
