"""Put back jobs of models that this worker does not serve: another worker of the pool may.

A queue is a pool's and a tier's, so such jobs come here as well. Their announcement is withdrawn,
and they are announced again where a live worker serves their model; if none does, they wait in
Postgres. The pause before that grows with each time that a job comes, or an idle worker that lacks
the model would have it again and again while those that serve it are busy.
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
    """Knows which checkpoints of its pool this worker does not serve now."""

    def __init__(
        self, database: Database, release: Release, lacking: Callable[[], frozenset[str]]
    ) -> None:
        """Know where to look. lacking: names them."""
        self._database = database
        self._release = release
        self._lacking = lacking
        self._came: Counter[uuid.UUID] = Counter()

    def puts_back(self, job_id: uuid.UUID) -> bool:
        """Put the job back if its model is not served here; tell whether it was."""
        lacking = self._lacking()
        if not lacking:
            return False
        with transaction(self._database) as session:
            job = session.get(Job, job_id, options=jobs.WITHOUT_TEXTS)
        if job is None or checkpoint_name(job.model, job.model_version) not in lacking:
            return False
        if len(self._came) >= REMEMBERED:
            self._came.clear()
        self._came[job_id] += 1
        time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._came[job_id] - 1)))
        self._release.put_back(job_id)
        return True
