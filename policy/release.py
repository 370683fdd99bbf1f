"""Decide which waiting jobs are released to Celery next, and whether a new one may go at once.

Pure bookkeeping over one (pool, tier): the caller says what waits, in fair order, and what is
outstanding; it stamps and publishes what is picked (models/releasing.py, dispatch/release.py).

The limit is as many images as the live workers can hold, and one batch more, so that they never run
dry. Where more is outstanding than they can hold, a tenant with much less than its fair share is
released to the front queue, also when the limit is reached; a job that comes back from another
worker always is. Workers take from the front queue first, and beyond their slots: their engine
parks what is less urgent. So one tenant may use every idle slot without others waiting for it.
"""

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from policy import tiers
from policy.fleet import Fleet

LEAST_SHARE = 4  # images: enough for one person at work


@dataclass(frozen=True)
class ReleaseLimits:
    """The number of images of one (pool, tier) that may be with Celery or with the workers.

    slots: what the live workers hold of this tier at once.  limit_images: what they may hold, and
    what may wait for them.  least_share: what a tenant may always have, however many share the
    tier.  max_per_tenant: what a tenant may never exceed; None = no cap.
    """

    slots: int
    limit_images: int
    least_share: int = 1
    max_per_tenant: int | None = None


@dataclass
class Outstanding:
    """The jobs of one (pool, tier) that are with Celery and the workers.

    images, running: images by tenant, and those of them that run.  running_s: predicted device
    seconds of these.  announced_jobs: the jobs that do not run yet.
    """

    images: Counter[uuid.UUID] = field(default_factory=Counter)
    running: Counter[uuid.UUID] = field(default_factory=Counter)
    running_s: float = 0.0
    announced_jobs: int = 0

    @property
    def total_images(self) -> int:
        """Count the images of all tenants."""
        return self.images.total()


@dataclass(frozen=True)
class WaitingJob:
    """A job that may be announced. attempt: above 0 if a worker had it before."""

    job_id: uuid.UUID
    tenant_id: uuid.UUID
    num_images: int
    release_tag: float
    attempt: int


@dataclass(frozen=True)
class PickedJob:
    """A job to be announced; `is_front`: in the front queue of its tier."""

    job_id: uuid.UUID
    is_front: bool
    num_images: int


@dataclass(frozen=True)
class LateJob:
    """A job that waited too long for its pool. is_announced: a message of it is out there."""

    job_id: uuid.UUID
    tenant_id: uuid.UUID
    num_images: int
    release_tag: float
    is_announced: bool = False


class ReleaseHint(Enum):
    """The action on the release of a job that is accepted now."""

    IMMEDIATE = auto()  # nobody waits and there is room: announce it as it is written
    TRY_RELEASE = auto()  # let a release look, once it is written
    BACKLOGGED = auto()  # many wait before it: the releases of jobs that end will come to it


def release_limits(fleet: Fleet, *, pool: str, tier: str, live_slots: int) -> ReleaseLimits:
    """Limit what may be outstanding of (pool, tier); the rest waits in Postgres, in fair order.

    live_slots: the sum over the pool's live workers, in images; 0 counts as one worker, so that the
    first to come finds work.
    """
    shape = fleet.pool_or_retired(pool)
    slots = live_slots or shape.slots
    return ReleaseLimits(
        slots=tiers.own_slots(fleet, tier, slots),
        limit_images=slots + shape.max_batch_rows,
        least_share=min(LEAST_SHARE, shape.slots),
        max_per_tenant=fleet.tier_or_retired(tier).max_in_hand_per_tenant,
    )


def exceeds_cap(limits: ReleaseLimits, *, held: int, num_images: int) -> bool:
    """Check whether a tenant that holds `held` images may not have `num_images` more outstanding.

    A job larger than the cap goes when its tenant has nothing else outstanding.
    """
    cap = limits.max_per_tenant
    return cap is not None and held + num_images > max(cap, num_images)


def is_behind(
    outstanding: Outstanding,
    limits: ReleaseLimits,
    *,
    tenant_id: uuid.UUID,
    num_images: int,
    sharing: int,
) -> bool:
    """Check whether a tenant must not wait for what others have outstanding.

    It must not if with `num_images` more it has at most half of its fair share, while some tenant
    runs more than its own. Half: two that always have work would else meet at the front, where
    neither gains anything. Runs: a tenant whose jobs only stand in line is in nobody's way, and
    would never get out of it if each newcomer passed it at the front.

    sharing: how many tenants have any outstanding or waiting, this one included.
    """
    held = outstanding.images[tenant_id]
    share = max(limits.least_share, limits.limit_images // sharing)
    running_share = max(limits.least_share, outstanding.running.total() // sharing)
    has_little = held == 0 or 2 * (held + num_images) <= share
    return has_little and max(outstanding.running.values(), default=0) > running_share


def may_go_at_once(
    outstanding: Outstanding, limits: ReleaseLimits, *, tenant_id: uuid.UUID, num_images: int
) -> bool:
    """Check whether a new job that nobody waits before may be announced in its tier's own queue.

    Beyond the slots it may have to go to the front queue, which is for `Selection` to decide. A job
    larger than the slots goes when nothing else is outstanding.
    """
    total = outstanding.total_images
    has_room = total == 0 or total + num_images <= limits.slots
    held = outstanding.images[tenant_id]
    return has_room and not exceeds_cap(limits, held=held, num_images=num_images)


def release_hint(
    outstanding: Outstanding,
    limits: ReleaseLimits,
    *,
    tenant_id: uuid.UUID,
    num_images: int,
    waiting_jobs: int,
    sharing: int,
) -> ReleaseHint:
    """Tell what to do about a new job, by what was seen of its (pool, tier) a moment ago.

    Only BACKLOGGED is a promise that nothing need be done, so it takes a backlog that cannot be
    gone by now: more jobs than all that may be outstanding.

    waiting_jobs: that wait to be announced.  sharing: as for `is_behind`.
    """
    if waiting_jobs <= 0 and may_go_at_once(
        outstanding, limits, tenant_id=tenant_id, num_images=num_images
    ):
        return ReleaseHint.IMMEDIATE
    must_not_wait = is_behind(
        outstanding, limits, tenant_id=tenant_id, num_images=num_images, sharing=sharing
    )
    if must_not_wait or waiting_jobs <= limits.limit_images:
        return ReleaseHint.TRY_RELEASE
    return ReleaseHint.BACKLOGGED


def jobs_to_move(
    late: Sequence[LateJob], limits: ReleaseLimits, *, room: int, held: Counter[uuid.UUID]
) -> list[LateJob]:
    """Choose which late jobs go to another pool that has room for so many images.

    late: in fair order; one that is larger than what is left of the room is passed.  limits: of the
    other pool.  held: images that each tenant has outstanding in both pools: a tenant at its cap
    waits for that, not for its pool.
    """
    moving = []
    outstanding = Counter(held)
    for job in late:
        more = 0 if job.is_announced else job.num_images
        is_capped = more and exceeds_cap(
            limits, held=outstanding[job.tenant_id], num_images=job.num_images
        )
        if job.num_images <= room and not is_capped:
            room -= job.num_images
            outstanding[job.tenant_id] += more
            moving.append(job)
    return moving


class Selection:
    """Pick the jobs of one release: first in fair order, then those of tenants that are behind.

    picked: by job id, in the order in which to publish them.  newest_tag: the release tag of the
    last one picked in fair order; None if none was. Those out of turn do not move virtual time, or
    who comes next would start behind all that still wait.
    """

    def __init__(self, outstanding: Outstanding, limits: ReleaseLimits) -> None:
        """Begin a selection. outstanding: picked images are added to it."""
        self._outstanding = outstanding
        self._limits = limits
        self.picked: dict[uuid.UUID, PickedJob] = {}
        self.newest_tag: float | None = None

    def take_in_order(self, line: Sequence[WaitingJob]) -> None:
        """Pick from the front of the line as far as there is room; tenants at their cap are passed.

        The next in line is not overtaken by a smaller one. A job larger than the limit goes alone.
        """
        for job in line:
            if self._exceeds_cap(job):
                continue
            total = self._outstanding.total_images
            if total and total + job.num_images > self._limits.limit_images:
                break
            sharing = len(self._outstanding.images.keys() | {job.tenant_id})
            passes = total >= self._limits.slots and self._is_due(job, sharing)
            self._pick(job, is_front=job.attempt > 0 or passes)
            self.newest_tag = job.release_tag

    def leaves_out_some_of(self, line: Sequence[WaitingJob]) -> bool:
        """Tell whether jobs may be left for which only `take_those_behind` has room.

        line: as it was handed to `take_in_order`.
        """
        is_full = self._outstanding.total_images >= self._limits.limit_images
        return len(self.picked) < len(line) or is_full

    def take_those_behind(self, heads: Sequence[WaitingJob]) -> None:
        """Pick for the front queue what must not wait, up to twice the limit.

        heads: the first waiting jobs of each tenant, in fair order.
        """
        tenants = self._outstanding.images.keys() | {job.tenant_id for job in heads}
        sharing = len(tenants) or 1
        for job in heads:
            total = self._outstanding.total_images
            has_room = total + job.num_images <= 2 * self._limits.limit_images
            is_new = job.job_id not in self.picked
            if has_room and is_new and not self._exceeds_cap(job) and self._is_due(job, sharing):
                self._pick(job, is_front=True)

    def _pick(self, job: WaitingJob, *, is_front: bool) -> None:
        self.picked[job.job_id] = PickedJob(job.job_id, is_front, job.num_images)
        self._outstanding.images[job.tenant_id] += job.num_images

    def _exceeds_cap(self, job: WaitingJob) -> bool:
        held = self._outstanding.images[job.tenant_id]
        return exceeds_cap(self._limits, held=held, num_images=job.num_images)

    def _is_due(self, job: WaitingJob, sharing: int) -> bool:
        """Check whether the job must not wait: a worker had it before, or its tenant is behind."""
        return job.attempt > 0 or is_behind(
            self._outstanding,
            self._limits,
            tenant_id=job.tenant_id,
            num_images=job.num_images,
            sharing=sharing,
        )
