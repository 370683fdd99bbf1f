"""Put back jobs that this worker does not serve: another worker of the pool may.

These are jobs of models that it lacks, and jobs that it was given before it follows the revision of
the fleet that they need. A queue is a pool's and a tier's, so such jobs come here as well. Their
announcement is withdrawn, and they are announced again where a live worker serves their model; if
none does, they wait in Postgres. The pause before that grows with each time that a job comes, or an
idle worker would have it again and again while those that serve it are busy.
"""

import time
import uuid
from collections import Counter
from collections.abc import Callable

from sqlalchemy import Engine as Database

from dispatch.release import Release
from models import jobs
from models.database import transaction
from models.tables import Job
from policy.fleet import checkpoint_name

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
REMEMBERED = 1000  # jobs


class LackingModels:
    """Knows which checkpoints of its pool this worker does not serve now, and which jobs."""

    def __init__(
        self,
        database: Database,
        release: Release,
        lacking: Callable[[], frozenset[str]],
        revisions: Callable[[], tuple[int, int]],
    ) -> None:
        """Know where to look. lacking: names the checkpoints.  revisions: that the worker goes by;
        what is set aside is tried again once they are others.
        """
        self._database = database
        self._release = release
        self._lacking = lacking
        self._revisions = revisions
        self._came: Counter[uuid.UUID] = Counter()
        self._set_aside: dict[uuid.UUID, tuple[int, int]] = {}

    def set_aside(self, job_id: uuid.UUID) -> None:
        """Put the job back, whenever it comes, until this worker goes by another revision."""
        if len(self._set_aside) >= REMEMBERED:
            self._set_aside.clear()
        self._set_aside[job_id] = self._revisions()

    def puts_back(self, job_id: uuid.UUID) -> bool:
        """Put the job back if it is not served here; tell whether it was."""
        if not (self._is_set_aside(job_id) or self._lacks_model_of(job_id)):
            return False
        if len(self._came) >= REMEMBERED:
            self._came.clear()
        self._came[job_id] += 1
        time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._came[job_id] - 1)))
        self._release.put_back(job_id)
        return True

    def _is_set_aside(self, job_id: uuid.UUID) -> bool:
        return self._set_aside.get(job_id) == self._revisions()

    def _lacks_model_of(self, job_id: uuid.UUID) -> bool:
        lacking = self._lacking()
        if not lacking:
            return False
        with transaction(self._database) as session:
            job = session.get(Job, job_id, options=jobs.WITHOUT_TEXTS)
        return job is not None and checkpoint_name(job.model, job.model_version) in lacking
