"""What the views of costs say of a few rows, worked out by hand. All prices are 3,600 an hour."""

import uuid
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from models import devicetime, jobs, leases
from models.devicetime import DevicePeriod, DeviceSeconds
from models.tables import Tenant
from policy.workers import WorkerTerms
from tests.builders import a_job, a_lease, a_left, hand_off, preempt, store

Rows = Sequence[Mapping[str, Any]]
DAY = datetime(2026, 3, 1, tzinfo=UTC)
A_SECOND_COSTS_ONE = WorkerTerms("", "spot", "any", 3600.0)


def _on(session: Session, day: datetime) -> None:
    """Move what was written in this transaction to that day."""
    for table, column in (("attempts", "ended_at"), ("artifacts", "created_at")):
        query = f"UPDATE {table} SET {column} = :day WHERE {column} > now() - interval '1 day'"
        session.execute(text(query), {"day": day})
    session.expire_all()


def _jobs(session: Session, tenant: Tenant) -> None:
    """Make seven jobs: of each the device seconds that were wasted are said beside it.

    One that failed once, one whose worker died, one canceled after an image was there, one whose
    tenant canceled it before its pixels were stored, one preempted without loss, one whose pixels
    were lost once, one under way.
    """
    own = {"tenant": tenant, "pool": tenant.name}

    def leased(job: Any, worker: str = "w") -> Any:
        return a_lease(session, job, worker=worker, terms=A_SECOND_COSTS_ONE)

    job = a_job(session, **own)
    lease = leased(job)
    leases.count_error(session, lease, detail="no", max_attempts=5)
    leases.note_waste(session, lease, device_seconds=1.5, steps_done={})  # error: 1.5
    hand_off(session, leased(job), device_seconds=2.0, padding_s=0.5)
    store(session, job, attempt=2)

    job = a_job(session, **own, num_images=2)
    lease = leased(job)
    hand_off(session, lease, 0, device_seconds=1.0)
    leases.note_unfinished(session, {(job.id, 1): 0.75})
    change = text("UPDATE jobs SET lease_expires_at = now() - interval '1 s' WHERE id = :id")
    session.execute(change, {"id": job.id})
    session.expire_all()
    leases.lose(session, job_id=job.id, max_attempts=5)  # lease_lost: 0.75
    hand_off(session, leased(job, "v"), 1, device_seconds=1.0)
    for index, attempt in ((0, 1), (1, 2)):
        store(session, job, index, attempt=attempt)

    job = a_job(session, **own, num_images=2)
    lease = leased(job)
    hand_off(session, lease, 0, device_seconds=1.0)
    store(session, job, 0)
    jobs.cancel(session, job.id, tenant_id=tenant.id, actor="tests")
    leases.note_waste(session, lease, device_seconds=0.25, steps_done={1: 1})  # canceled: 0.25

    job = a_job(session, **own)
    hand_off(session, leased(job), device_seconds=0.5)
    jobs.cancel(session, job.id, tenant_id=tenant.id, actor="tests")  # canceled: 0.5

    job = a_job(session, **own)
    preempt(session, leased(job), left=[a_left(device_seconds=0.5)])
    lease = leased(job)
    leases.note_resumption(session, lease, resumed={0: 2}, lost_steps=0)
    hand_off(session, lease, device_seconds=0.5)
    store(session, job, attempt=2)

    job = a_job(session, **own)
    hand_off(session, leased(job), device_seconds=3.0)  # not_stored: 3
    leases.lose_hand_off(session, job.id, [0], attempt_of={0: 1})
    hand_off(session, leased(job), device_seconds=1.0)
    store(session, job, attempt=2)

    hand_off(session, leased(a_job(session, **own)), device_seconds=8.0)  # to be stored
    session.flush()
    _on(session, DAY + timedelta(hours=23, minutes=30))


WASTED = {"canceled": "0.750", "error": "1.500", "lease_lost": "0.750", "not_stored": "3.000"}
STORED_S = Decimal("7.000")
NUM_STORED = 6


def wasted_time_by_day(session: Session, tenant: Tenant) -> Rows:
    _jobs(session, tenant)
    own = {"day": DAY.date(), "tenant": tenant.name, "pool": tenant.name, "tier": "fast"}
    return [
        {
            **own,
            "model": "pocket",
            "waste_class": why,
            "gpu_seconds": Decimal(s),
            "cost": Decimal(s),
        }
        for why, s in sorted(WASTED.items())
    ]


def costs_by_tenant_day(session: Session, tenant: Tenant) -> Rows:
    _jobs(session, tenant)
    wasted = sum(map(Decimal, WASTED.values()))
    return [
        {
            "day": date(2026, 3, 1),
            "tenant": tenant.name,
            "tier": "fast",
            "model": "pocket",
            "images": NUM_STORED,
            "gpu_seconds": STORED_S,
            "padding_s": Decimal("0.5"),
            "wasted_s": wasted,
            "device_cost": STORED_S,
            "wasted_cost": wasted,
            "cost_per_image": round((STORED_S + wasted) / NUM_STORED, 6),
            "charged": 2 * STORED_S,  # by the tier's weight
        }
    ]


def _put(session: Session, tenant: Tenant, worker: str, at: datetime, **spent: float) -> None:
    period = DevicePeriod(
        worker=worker,
        instance=uuid.uuid4(),
        pool=tenant.name,
        terms=A_SECOND_COSTS_ONE,
        since=at,
        spent=DeviceSeconds(**spent),
    )
    devicetime.put(session, period)
    devicetime.put(session, period)  # as after a commit whose answer was lost


def device_time_by_hour(session: Session, tenant: Tenant) -> Rows:
    """Of two workers in one hour, and of one in the next."""
    busy = {"encode_s": 1.0, "denoise_s": 6.0, "decode_s": 2.0, "padding_s": 1.5}
    first = DAY + timedelta(minutes=5)
    told = {"startup_s": 10.0, "idle_s": 20.0, "turns_s": 10.0, "loads_s": 1.0, **busy}
    _put(session, tenant, "a", first, billed_s=42.0, **told)
    _put(session, tenant, "b", first + timedelta(minutes=54), billed_s=10.0, idle_s=10.0)
    _put(session, tenant, "b", first + timedelta(minutes=55), billed_s=5.0, startup_s=5.0)
    own = {"pool": tenant.name, "capacity_class": "", "market": "spot"}
    nothing = dict.fromkeys(
        (
            "encode_s",
            "denoise_s",
            "decode_s",
            "padding_s",
            "host_s",
            "loads_s",
            "idle_s",
            "other_s",
        ),
        Decimal(0),
    )
    return [
        {
            **own,
            "hour": DAY,
            "workers": 2,
            "billed_s": Decimal(52),
            "encode_s": Decimal(1),
            "denoise_s": Decimal("4.5"),
            "decode_s": Decimal(2),
            "padding_s": Decimal("1.5"),
            "host_s": Decimal(1),
            "loads_s": Decimal(1),
            "startup_s": Decimal(10),
            "idle_s": Decimal(30),
            "other_s": Decimal(1),
            "cost": Decimal(52),
        },
        {
            **own,
            **nothing,
            "hour": DAY + timedelta(hours=1),
            "workers": 1,
            "billed_s": Decimal(5),
            "startup_s": Decimal(5),
            "cost": Decimal(5),
        },
    ]


def costs_by_pool_day(session: Session, tenant: Tenant) -> Rows:
    """A worker was busy for 13.25 s, of which images and waste account for 13."""
    _jobs(session, tenant)
    busy = {"encode_s": 1.0, "denoise_s": 11.0, "decode_s": 1.25, "padding_s": 0.5}
    told = {"startup_s": 10.0, "idle_s": 20.0, "turns_s": 14.0, **busy}
    _put(session, tenant, "a", DAY + timedelta(hours=3), billed_s=44.0, **told)
    return [
        {
            "day": DAY.date(),
            "pool": tenant.name,
            "billed_s": Decimal(44),
            "busy_s": Decimal("12.75"),
            "padding_s": Decimal("0.5"),
            "host_s": Decimal("0.75"),
            "startup_s": Decimal(10),
            "idle_s": Decimal(20),
            "stored_s": STORED_S,
            "wasted_s": Decimal(6),
            "unexplained_s": Decimal("0.25"),
            "images": NUM_STORED,
            "cost": Decimal(44),
            "cost_per_image": round(Decimal(44) / NUM_STORED, 6),
            "floor_per_image": round(STORED_S / NUM_STORED, 6),
        }
    ]
