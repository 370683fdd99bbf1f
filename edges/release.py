"""From waiting rows to messages: stamp in Postgres, commit, publish. Called at accept, at finish and by the sweeper.

A crash between the stamp and the message, or a broker that is down, costs seconds: the sweeper sees a stamped row
whose message is nowhere and announces it again. A job that starts from pictures has them brought first (models/inputs.py).
"""

import uuid
from collections.abc import Sequence

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from edges.broker import Broker, BrokerUnavailable
from models import inputs, releasing, workers
from models.database import run_transaction, transaction
from models.releasing import Picked, Room
from models.states import JobState
from models.tables import Job
from policy import admission, queues
from policy.fleet import Fleet

log = structlog.get_logger(__name__)


class Release:
    """Lets waiting jobs out to Celery as room allows."""

    def __init__(self, engine: Engine, broker: Broker, fleet: Fleet, *, worker_silence_s: float) -> None:
        self._engine, self._broker, self._fleet = engine, broker, fleet
        self._worker_silence_s = worker_silence_s

    def release(self, pool: str, tier: str, *, tenant_id: uuid.UUID | None = None) -> int:
        """Announce the next waiting jobs of (pool, tier), in fair order, up to the free room; how many is returned.

        tenant_id: whose job was just accepted; only this tenant is looked at when the tier's own room is full.
        """

        def pick(session: Session) -> tuple[list[Picked], list[uuid.UUID]]:
            slots = workers.capacity(session, pool=pool, silent_for_s=self._worker_silence_s).slots
            room = self.room(pool, tier, slots)
            picked = releasing.pick(session, pool=pool, tier=tier, room=room, tenant_id=tenant_id)
            return picked, inputs.ask(session, pool=pool, tier=tier, most=room.limit_images)

        picked, lacking = run_transaction(self._engine, pick)
        self._ask_for_inputs(tier, lacking)
        return self._publish(pool, tier, picked)

    def ask_for_inputs_again(self, pool: str, tier: str, *, asked_before_s: float) -> int:
        """Have pictures brought that were asked for that long ago and did not come; how many jobs wait for theirs is returned.

        The stamps stay also where nobody can be asked: without its stamp a job past its start deadline would expire.
        """
        with transaction(self._engine) as session:
            lacking = inputs.ask_again(session, pool=pool, tier=tier, asked_before_s=asked_before_s)
        self._publish_asking(tier, lacking)
        return len(lacking)

    def room(self, pool: str, tier: str, live_slots: int) -> Room:
        """How much of (pool, tier) may be in hand where the live workers hold `live_slots` images."""
        return Room(
            slots=admission.tier_slots(self._fleet, tier, live_slots or self._fleet.pools[pool].slots),
            limit_images=admission.announced_limit(self._fleet, pool, live_slots),
            least_share=admission.least_share(self._fleet, pool),
            most_of_one=self._fleet.tiers[tier].max_in_hand_per_tenant if tier in self._fleet.tiers else None,
        )

    def announce(self, pool: str, tier: str, job_id: uuid.UUID, *, num_images: int) -> None:
        """Publish a job that was stamped as it was accepted."""
        self._publish(pool, tier, [Picked(job_id, is_front=False, num_images=num_images)])

    def again(self, pool: str, tier: str, job_ids: Sequence[uuid.UUID]) -> int:
        """Announce jobs whose message was lost; those that a worker took meanwhile are left out."""
        picked = run_transaction(self._engine, lambda session: releasing.announce_again(session, job_ids))
        return self._publish(pool, tier, picked)

    def pass_on(self, job_id: uuid.UUID) -> None:
        """Announce a job that came to a worker who cannot take it; nothing if it waits no more."""
        with transaction(self._engine) as session:
            job = session.get(Job, job_id)
        if job is not None and job.state == JobState.QUEUED:
            self.again(job.pool, job.tier, [job_id])

    def _ask_for_inputs(self, tier: str, job_ids: Sequence[uuid.UUID]) -> None:
        if left := self._publish_asking(tier, job_ids):
            with transaction(self._engine) as session:
                inputs.forget_asking(session, left)

    def _publish_asking(self, tier: str, job_ids: Sequence[uuid.UUID]) -> Sequence[uuid.UUID]:
        """Ask for the pictures of each job; those that could not be asked for are returned."""
        for position, job_id in enumerate(job_ids):
            try:
                self._broker.announce(queues.STAGE_INPUTS, queues.results_queue(self._fleet, tier), job_id)
            except BrokerUnavailable as error:
                log.warning("inputs_not_asked_for", job_id=str(job_id), reason=str(error))
                return job_ids[position:]
        return ()

    def _publish(self, pool: str, tier: str, picked: Sequence[Picked]) -> int:
        for position, job in enumerate(picked):
            try:
                queue = queues.render_queue(pool, tier, is_front=job.is_front)
                self._broker.announce(queues.RENDER_JOB, queue, job.job_id, num_images=job.num_images)
            except BrokerUnavailable as error:
                log.warning("announce_failed", job_id=str(job.job_id), reason=str(error))
                self._withdraw([left.job_id for left in picked[position:]])
                return position
        return len(picked)

    def _withdraw(self, job_ids: Sequence[uuid.UUID]) -> None:
        """Take the stamps back; where even that fails, the sweeper finds stamps without messages. The jobs are accepted all the same."""
        try:
            run_transaction(self._engine, lambda session: releasing.withdraw(session, job_ids))
        except SQLAlchemyError as error:
            log.warning("withdrawal_failed", jobs=len(job_ids), reason=type(error).__name__)
