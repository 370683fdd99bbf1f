"""Put back jobs that another worker of the pool is to have.

These are jobs of models that this one lacks, and jobs that it was given before it follows the
revision of the fleet that they need. A queue is a pool's and a tier's, so such jobs come here as
well. Their announcement is withdrawn, and they are announced again where a live worker serves their
model; if none does, they wait in Postgres. The pause before that grows with each time that a job
comes, or an idle worker would have it again and again while those that serve it are busy.

A model that is served here but not loaded is left to a worker that has it and is free, a few times:
less than a second. Then it is loaded here.
"""

import time
import uuid
from collections import Counter
from collections.abc import Callable

from sqlalchemy import Engine as Database

from dispatch.release import Release
from models import jobs, workers
from models.database import transaction
from models.tables import Job
from policy.fleet import checkpoint_name
from policy.residency import LEFT_TO_HOLDERS
from tasks.residency import Residency

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
REMEMBERED = 1000  # jobs


class LackingModels:
    """Knows which checkpoints of its pool are not at this worker's hand now, and which jobs."""

    def __init__(
        self,
        database: Database,
        release: Release,
        residency: Residency,
        *,
        lacking: Callable[[], frozenset[str]],
        revisions: Callable[[], tuple[int, int]],
        worker: str,
        worker_silence_s: float,
    ) -> None:
        """Know where to look.

        lacking: names the checkpoints that are not served here.  revisions: that the worker goes
        by; what is set aside is tried again once they are others.  worker: the name of this one.
        worker_silence_s: another one not heard of for so long counts as gone.
        """
        self._database = database
        self._release = release
        self._residency = residency
        self._lacking = lacking
        self._revisions = revisions
        self._worker = worker
        self._worker_silence_s = worker_silence_s
        self._came: Counter[uuid.UUID] = Counter()
        self._set_aside: dict[uuid.UUID, tuple[int, int]] = {}

    def set_aside(self, job_id: uuid.UUID) -> None:
        """Put the job back, whenever it comes, until this worker goes by another revision."""
        if len(self._set_aside) >= REMEMBERED:
            self._set_aside.clear()
        self._set_aside[job_id] = self._revisions()

    def puts_back(self, job_id: uuid.UUID) -> bool:
        """Put the job back if another worker is to have it; tell whether it was."""
        if not (self._is_set_aside(job_id) or self._is_others(job_id)):
            return False
        if len(self._came) >= REMEMBERED:
            self._came.clear()
        self._came[job_id] += 1
        time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._came[job_id] - 1)))
        self._release.put_back(job_id)
        return True

    def _is_set_aside(self, job_id: uuid.UUID) -> bool:
        return self._set_aside.get(job_id) == self._revisions()

    def _is_others(self, job_id: uuid.UUID) -> bool:
        """Tell whether the job's model is not served here, or loaded by a worker that is free."""
        lacking, absent = self._lacking(), self._residency.absent
        if not lacking | absent:
            return False
        with transaction(self._database) as session:
            job = session.get(Job, job_id, options=jobs.WITHOUT_TEXTS)
            checkpoint = checkpoint_name(job.model, job.model_version) if job is not None else ""
            if job is None or checkpoint not in absent:
                return checkpoint in lacking
            return self._came[job_id] < LEFT_TO_HOLDERS and workers.has_free_holder(
                session,
                checkpoint,
                pool=job.pool,
                but=self._worker,
                silent_for_s=self._worker_silence_s,
            )
