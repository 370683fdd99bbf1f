"""Release waiting jobs to Celery: stamp them in Postgres, commit, publish.

Called when a job is accepted, when one ends, and by the sweeper. Which jobs go is decided by
`policy.release`. A crash between the stamp and the message, or a broker that is down, costs
seconds: the sweeper sees a stamped row whose message is nowhere and announces it again. A job that
starts from pictures has them brought first (models/inputs.py).
"""

import uuid
from collections import Counter
from collections.abc import Sequence

import structlog
from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session

from edges.broker import Broker, BrokerUnavailable
from models import inputs, overflowing, releasing, workers
from models.database import run_transaction, transaction
from models.tables import Job
from policy import queues, routing, tiers
from policy.current import CurrentFleet, current
from policy.fleet import Fleet
from policy.release import (
    LateJob,
    PickedJob,
    ReleaseLimits,
    exceeds_cap,
    jobs_to_move,
    release_limits,
)
from policy.routing import LivePool, Overflow
from policy.states import JobState

log = structlog.get_logger(__name__)


class Release:
    """Announces waiting jobs to Celery as the limits allow."""

    def __init__(
        self,
        engine: Engine,
        broker: Broker,
        fleet: Fleet | CurrentFleet,
        *,
        worker_silence_s: float,
    ) -> None:
        """Keep the parts. worker_silence_s: a worker not heard of for so long counts as gone."""
        self._engine = engine
        self._broker = broker
        self._current = current(fleet)
        self._worker_silence_s = worker_silence_s

    def release(self, pool: str, tier: str, *, tenant_id: uuid.UUID | None = None) -> int:
        """Announce the next waiting jobs of (pool, tier), in fair order; return how many.

        tenant_id: whose job was just accepted; when the limit is reached, only this tenant's jobs
        are looked at.
        """

        def pick(session: Session) -> tuple[list[PickedJob], list[uuid.UUID]]:
            capacity = workers.capacity(session, pool=pool, silent_for_s=self._worker_silence_s)
            limits = self.limits(pool, tier, capacity.slots)
            picked = releasing.pick(
                session,
                pool=pool,
                tier=tier,
                limits=limits,
                tenant_id=tenant_id,
                lacking=self._lacking(pool, capacity),
            )
            lacking = inputs.ask(session, pool=pool, tier=tier, most=limits.limit_images)
            return picked, lacking

        picked, lacking = run_transaction(self._engine, pick)
        self._ask_for_inputs(tier, lacking)
        return self._publish(pool, tier, picked)

    def overflow(self, pool: str, tier: str) -> int:
        """Move jobs that waited too long for `pool` to where fleet.toml says; return how many.

        As far as that pool has live workers and idle room; they are announced there at once.
        """
        other = self._current.fleet.pools[pool].overflow_to
        if other is None:
            return 0
        with transaction(self._engine) as session:
            there = workers.capacity(session, pool=other, silent_for_s=self._worker_silence_s)
            live = LivePool(there.devices, there.held)
            way = routing.overflow(self._current.fleet, pool=pool, tier=tier, live=live)
            late = [] if way is None else self._late_jobs(session, pool, tier, way, there.slots)
        moved = [job.job_id for job in late if way is not None and self._move(job.job_id, way)]
        if moved:
            log.info("jobs_overflowed", pool=pool, tier=tier, to=other, jobs=len(moved))
            self.release(other, tier)
        return len(moved)

    def _late_jobs(
        self, session: Session, pool: str, tier: str, way: Overflow, live_slots: int
    ) -> list[LateJob]:
        """Choose the jobs that go to the other pool, which has so many live slots."""
        slots = tiers.own_slots(self._current.fleet, tier, live_slots)
        room = overflowing.idle_images(session, pool=way.pool, slots=slots)
        if room == 0:
            return []
        limits = self.limits(way.pool, tier, live_slots)
        held = Counter[uuid.UUID]()
        for each in (pool, way.pool):
            held += releasing.outstanding_in(session, pool=each, tier=tier).images
        capped = [
            tenant
            for tenant, images in held.items()
            if exceeds_cap(limits, held=images, num_images=1)
        ]
        here = workers.capacity(session, pool=pool, silent_for_s=self._worker_silence_s)
        late = overflowing.late_jobs(
            session,
            pool=pool,
            tier=tier,
            way=way,
            room=room,
            without=capped,
            also_announced=not here.devices,
        )
        return jobs_to_move(late, limits, room=room, held=held)

    def _move(self, job_id: uuid.UUID, way: Overflow) -> bool:
        def move(session: Session) -> Job | None:
            return overflowing.move(session, job_id, way=way, actor="sweeper")

        return run_transaction(self._engine, move) is not None

    def ask_for_inputs_again(self, pool: str, tier: str, *, asked_before_s: float) -> int:
        """Have pictures brought that were asked for that long ago and did not come.

        Returns how many jobs wait for theirs. The stamps stay also where nobody can be asked:
        without its stamp a job past its start deadline would expire.
        """
        with transaction(self._engine) as session:
            late = inputs.ask_again(session, pool=pool, tier=tier, asked_before_s=asked_before_s)
        self._publish_asking(tier, late)
        return len(late)

    def limits(self, pool: str, tier: str, live_slots: int) -> ReleaseLimits:
        """Limit what may be outstanding while the live workers hold so many images at once."""
        return release_limits(self._current.fleet, pool=pool, tier=tier, live_slots=live_slots)

    def announce(self, pool: str, tier: str, job_id: uuid.UUID, *, num_images: int) -> None:
        """Publish a job that was stamped as it was accepted."""
        self._publish(pool, tier, [PickedJob(job_id, is_front=False, num_images=num_images)])

    def reannounce(self, pool: str, tier: str, job_ids: Sequence[uuid.UUID]) -> int:
        """Announce jobs whose message was lost, but for those that a worker took meanwhile."""
        picked = run_transaction(
            self._engine, lambda session: releasing.announce_again(session, job_ids)
        )
        return self._publish(pool, tier, picked)

    def return_to_queue(self, job_id: uuid.UUID) -> None:
        """Announce a job that came to a worker which cannot take it, if it still waits."""
        with transaction(self._engine) as session:
            job = session.get(Job, job_id)
        if job is not None and job.state == JobState.QUEUED:
            self.reannounce(job.pool, job.tier, [job_id])

    def put_back(self, job_id: uuid.UUID) -> None:
        """Take back the announcement of a job that came to a worker which lacks its model.

        It is announced again at once if another live worker has it, and otherwise waits.
        """
        with transaction(self._engine) as session:
            job = session.get(Job, job_id)
            if job is None or job.state != JobState.QUEUED:
                return
            releasing.withdraw(session, [job_id])
        self.release(job.pool, job.tier)

    def _lacking(self, pool: str, capacity: workers.Capacity) -> frozenset[str]:
        """List the pool's checkpoints that no live worker serves; none if nothing is known."""
        if capacity.held is None:
            return frozenset()
        fleet = self._current.fleet
        has = fleet.checkpoints_in(pool) if pool in fleet.pools else frozenset()
        return has - capacity.held

    def _ask_for_inputs(self, tier: str, job_ids: Sequence[uuid.UUID]) -> None:
        if left := self._publish_asking(tier, job_ids):
            with transaction(self._engine) as session:
                inputs.forget_asking(session, left)

    def _publish_asking(self, tier: str, job_ids: Sequence[uuid.UUID]) -> Sequence[uuid.UUID]:
        """Ask for the pictures of each job; return those that could not be asked for."""
        queue = queues.results_queue(self._current.fleet, tier)
        for position, job_id in enumerate(job_ids):
            try:
                self._broker.announce(queues.STAGE_INPUTS, queue, job_id)
            except BrokerUnavailable as error:
                log.warning("inputs_not_asked_for", job_id=str(job_id), reason=str(error))
                return job_ids[position:]
        return ()

    def _publish(self, pool: str, tier: str, picked: Sequence[PickedJob]) -> int:
        fleet = self._current.fleet
        for position, job in enumerate(picked):
            queue = queues.queue_of_jobs(fleet, pool, tier, is_front=job.is_front)
            try:
                self._broker.announce(
                    queues.RENDER_JOB, queue, job.job_id, num_images=job.num_images
                )
            except BrokerUnavailable as error:
                log.warning("announce_failed", job_id=str(job.job_id), reason=str(error))
                self._withdraw([left.job_id for left in picked[position:]])
                return position
        return len(picked)

    def _withdraw(self, job_ids: Sequence[uuid.UUID]) -> None:
        """Take the stamps back: the jobs are accepted all the same.

        Where even that fails, the sweeper finds stamps without messages.
        """
        try:
            run_transaction(self._engine, lambda session: releasing.withdraw(session, job_ids))
        except SQLAlchemyError as error:
            log.warning("withdrawal_failed", jobs=len(job_ids), reason=type(error).__name__)
