"""From waiting rows to messages: stamp in Postgres, commit, publish. Called at accept, at finish and by the sweeper.

A crash between the stamp and the message, or a broker that is down, costs seconds: the sweeper sees a stamped row
whose message is nowhere and announces it again.
"""

import uuid
from collections.abc import Sequence

import structlog
from sqlalchemy import Engine

from edges.broker import Broker, BrokerUnavailable
from models import releasing, workers
from models.database import transaction
from policy import admission, queues
from policy.fleet import Fleet

log = structlog.get_logger(__name__)


class Release:
    """Lets waiting jobs out to Celery as room allows."""

    def __init__(self, engine: Engine, broker: Broker, fleet: Fleet, *, worker_silence_s: float) -> None:
        self._engine, self._broker, self._fleet = engine, broker, fleet
        self._worker_silence_s = worker_silence_s

    def release(self, pool: str, tier: str) -> int:
        """Announce the next waiting jobs of (pool, tier), in fair order, up to the free room; how many is returned."""
        with transaction(self._engine) as session:
            slots = workers.live_slots(session, pool=pool, silent_for_s=self._worker_silence_s)
            limit_images = admission.announced_limit(self._fleet, pool, slots)
            job_ids = releasing.pick(session, pool=pool, tier=tier, limit_images=limit_images)
        return self._publish(pool, tier, job_ids)

    def again(self, pool: str, tier: str, job_ids: Sequence[uuid.UUID]) -> int:
        """Announce jobs whose message was lost; those that a worker took meanwhile are left out."""
        with transaction(self._engine) as session:
            still_queued = releasing.announce(session, job_ids)
        return self._publish(pool, tier, still_queued)

    def _publish(self, pool: str, tier: str, job_ids: Sequence[uuid.UUID]) -> int:
        for position, job_id in enumerate(job_ids):
            try:
                self._broker.announce(queues.RENDER_JOB, queues.render_queue(pool, tier), job_id)
            except BrokerUnavailable as error:
                log.warning("announce_failed", job_id=str(job_id), reason=str(error))
                with transaction(self._engine) as session:
                    releasing.withdraw(session, job_ids[position:])
                return position
        return len(job_ids)
