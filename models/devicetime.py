"""Keep what the time of workers' devices was spent on, in rows of at most an hour.

A worker writes the whole row again with every heartbeat, so one that is written twice, or not at
all, does no harm. What it is paid for and what images took are two records, kept apart on purpose:
the view `device_time_by_hour` reads this one, `wasted_time_by_day` the attempts', and what both
say of the busy time is the same within a heartbeat.
"""

import uuid
from dataclasses import dataclass, fields
from datetime import datetime

from sqlalchemy import func
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from models.tables import DeviceTime
from policy.workers import WorkerTerms


@dataclass(frozen=True, kw_only=True)
class DeviceSeconds:
    """Divide the seconds that a worker's process has had its device.

    startup_s: until it was ready.  idle_s: without an image.  turns_s: with images; of these
    encode_s, denoise_s and decode_s were device time, padding_s is part of denoise_s, and the rest
    is the host's.  loads_s: warm-ups beside images.
    """

    billed_s: float = 0.0
    startup_s: float = 0.0
    idle_s: float = 0.0
    turns_s: float = 0.0
    loads_s: float = 0.0
    encode_s: float = 0.0
    denoise_s: float = 0.0
    decode_s: float = 0.0
    padding_s: float = 0.0

    def since(self, earlier: "DeviceSeconds") -> "DeviceSeconds":
        """Return what was added since `earlier`."""
        names = [one.name for one in fields(self)]
        return DeviceSeconds(
            **{name: getattr(self, name) - getattr(earlier, name) for name in names}
        )


@dataclass(frozen=True, kw_only=True)
class DevicePeriod:
    """Some time of one worker's process under the same terms, within one hour. since: its start."""

    worker: str
    instance: uuid.UUID
    pool: str
    terms: WorkerTerms
    since: datetime
    spent: DeviceSeconds


def put(session: Session, period: DevicePeriod) -> None:
    """Write the period, or write it anew with what it has come to."""
    terms = period.terms
    row = {
        "pool": period.pool,
        "capacity_class": terms.capacity_class,
        "market": terms.market,
        "gpu_class": terms.gpu_class,
        "gpu_hour_price": terms.gpu_hour_price,
        "until": func.clock_timestamp(),
        **vars(period.spent),
    }
    key = {"worker": period.worker, "instance": period.instance, "since": period.since}
    session.execute(
        insert(DeviceTime)
        .values(**key, **row)
        .on_conflict_do_update(index_elements=list(key), set_=row)
    )
