"""Put back jobs of models that this worker does not hold: another worker of the pool may.

It could not load the model, or a revision of the fleet added it and this worker has yet to start
anew.

A queue is a pool's and a tier's, so such jobs come here as well. Their announcement is withdrawn,
and they are announced again where a live worker serves their model; if none does, they wait in
Postgres. The pause before that grows with each time that a job comes, or an idle worker that lacks
the model would have it again and again while those that serve it are busy.
"""

import time
import uuid
from collections import Counter
from collections.abc import Collection

from sqlalchemy import Engine as Database

from dispatch.release import Release
from models import jobs
from models.database import transaction
from models.tables import Job
from policy.current import CurrentFleet
from policy.fleet import checkpoint_name
from tasks.registration import WorkerIdentity

FIRST_PAUSE_S = 0.05
LONGEST_PAUSE_S = 2.0
REMEMBERED = 1000  # jobs


class LackingModels:
    """Knows the checkpoints that this worker should serve and does not, by name."""

    def __init__(
        self, database: Database, release: Release, who: WorkerIdentity, current: CurrentFleet
    ) -> None:
        self._database = database
        self._release = release
        self._who = who
        self._current = current
        self._came: Counter[uuid.UUID] = Counter()

    def puts_back(self, job_id: uuid.UUID) -> bool:
        """Put the job back if its model is not served here; tell whether it was."""
        lacked = self._lacked()
        if not lacked:
            return False
        with transaction(self._database) as session:
            job = session.get(Job, job_id, options=jobs.WITHOUT_TEXTS)
        if job is None or checkpoint_name(job.model, job.model_version) not in lacked:
            return False
        if len(self._came) >= REMEMBERED:
            self._came.clear()
        self._came[job_id] += 1
        time.sleep(min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2 ** (self._came[job_id] - 1)))
        self._release.put_back(job_id)
        return True

    def _lacked(self) -> Collection[str]:
        """Return what the fleet has in this worker's pool now, without what the engine holds."""
        fleet = self._current.fleet
        if self._who.held is None or self._who.pool not in fleet.pools:
            return frozenset()
        return fleet.checkpoints_in(self._who.pool).difference(self._who.held)
