"""Move jobs that waited too long for their pool to another one that has idle room.

Where they may go is said by `policy.routing.overflow`. A job that is moved goes before nobody: it
takes room that no job of the other pool waits for. Its share of device time was charged where it
was accepted, so its tenant's flow in the other pool is not charged again.
"""

import uuid

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from models import jobs, releasing
from models.database import statement_time
from models.tables import FairClock, Flow, Job, Tenant
from policy.routing import Overflow
from policy.states import JobState

_CHECKPOINT = Job.model + "@" + Job.model_version  # policy.fleet.checkpoint_name


def idle_images(session: Session, *, pool: str, slots: int) -> int:
    """Count the images for which the pool has room; 0 if any of its own jobs waits.

    slots: how many it may hold.
    """
    outstanding = releasing.outstanding_by_tier(session, pool=pool).values()
    queued = session.scalar(
        select(func.coalesce(func.sum(Flow.queued_jobs), 0)).where(Flow.pool == pool)
    )
    if int(queued or 0) > sum(tier.announced_jobs for tier in outstanding):
        return 0
    return max(0, slots - sum(tier.total_images for tier in outstanding))


def late_jobs(
    session: Session, *, pool: str, tier: str, way: Overflow, most_images: int
) -> list[uuid.UUID]:
    """List queued jobs of (pool, tier) that waited too long, in fair order.

    Also those that are announced: a pool without workers takes none of its messages.
    """
    waits_since = statement_time() - func.make_interval(0, 0, 0, 0, 0, 0, way.after_s)
    query = select(Job.id, Job.num_images).where(
        Job.pool == pool,
        Job.tier == tier,
        Job.state == JobState.QUEUED,
        ~Job.lacks_inputs,
        Job.attempt == 0,  # one that was begun stays near its snapshots
        Job.accepted_at < waits_since,
        _CHECKPOINT.in_(sorted(way.checkpoints)),
    )
    if way.tenants:
        query = query.join(Tenant, Tenant.id == Job.tenant_id).where(Tenant.name.in_(way.tenants))
    late = []
    for job_id, num_images in session.execute(
        query.order_by(Job.release_tag, Job.id).limit(most_images)
    ):
        most_images -= num_images
        if most_images < 0:
            break
        late.append(job_id)
    return late


def move(session: Session, job_id: uuid.UUID, *, way: Overflow, actor: str) -> Job | None:
    """Have a job that is still queued wait in the other pool; None if it is not."""
    job = session.get(Job, job_id, with_for_update=True, options=jobs.WITHOUT_TEXTS)
    if job is None or job.state != JobState.QUEUED or job.pool == way.pool:
        return None
    clock = session.get(FairClock, (way.pool, job.tier))
    tag = job.release_tag if clock is None else clock.virtual_s
    left = job.pool
    jobs.enter_pool(session, job, way.pool, release_tag=tag)
    jobs.note_pool_change(session, job, left=left, actor=actor)
    return job
