"""Bring the pictures that a job starts from to its GPU: out of the object store, in the job's size, into the hand-off.

A GPU worker has no key to the store, so it asks; whoever stores results answers.
"""

import uuid
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import structlog
from numpy.typing import NDArray
from sqlalchemy import Engine as Database

from edges import telemetry
from edges.handoff import HandoffUnavailable
from edges.inputs import Brought, Gone, Inputs
from edges.objectstore import ObjectGone, ObjectStore, StoreUnavailable
from edges.pictures import fitted, fitted_mask
from models import files, jobs
from models.database import transaction
from models.states import JobState
from models.tables import Job

log = structlog.get_logger(__name__)

_FIT: dict[str, Callable[[bytes, int, int], NDArray[np.uint8]]] = {
    "init_image": fitted,
    "mask": fitted_mask,
    "control_image": fitted,
}


@dataclass(frozen=True, kw_only=True)
class Bringer:
    """One per results worker."""

    database: Database
    inputs: Inputs
    store: ObjectStore

    def bring_inputs(self, *, job_id: str) -> None:
        """Bring every picture of a job that runs and has not got them. Harmless when repeated: whoever waits asks again."""
        structlog.contextvars.clear_contextvars()
        structlog.contextvars.bind_contextvars(job_id=job_id)
        try:
            self._bring(uuid.UUID(job_id))
        except (StoreUnavailable, HandoffUnavailable) as error:
            log.warning("inputs_postponed", reason=str(error))
        except BaseException as error:
            log.error("bring_task_failed", exc_info=error)

    def _bring(self, job_id: uuid.UUID) -> None:
        with transaction(self.database) as session:
            job = jobs.without_words(session, job_id)
        if job is None or job.state != JobState.RUNNING or self.inputs.are_there(job_id):
            telemetry.DUPLICATES.labels("bring").inc()
            return
        brought = {role: self._picture(job, role, file_id) for role, file_id in files.of_job(job).items()}
        self.inputs.bring(job_id, brought)
        telemetry.INPUTS_BROUGHT.inc(len(brought))

    def _picture(self, job: Job, role: str, file_id: uuid.UUID) -> Brought:
        with transaction(self.database) as session:
            file = files.find(session, file_id, tenant_id=job.tenant_id)
        if file is None:
            return self._gone(role, file_id, "was erased")
        try:
            content = self.store.get(file.object_key)
        except ObjectGone:
            return self._gone(role, file_id, "is not in the object store any more")
        return _FIT[role](content, job.width_px, job.height_px)

    def _gone(self, role: str, file_id: uuid.UUID, what: str) -> Gone:
        telemetry.INPUTS_GONE.inc()
        log.error("input_gone", role=role, file_id=str(file_id))
        return Gone(f"{role}: file {file_id} {what}")
