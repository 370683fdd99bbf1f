"""Keep which devices were lost, and which of them get no worker until an operator releases them.

A device is lost when its worker ends because of it. The worker's launcher notes that; the rows are
what is remembered when the launcher is started anew, and what all hosts see.
"""

import uuid
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

from sqlalchemy import delete, func, or_, select
from sqlalchemy.orm import Session

from models import audit
from models.audit_events import EventName
from models.tables import LostDevice, Worker
from policy.workers import LOST_TWICE_WITHIN


@dataclass(frozen=True, kw_only=True)
class Loss:
    """One loss of a device, as the launcher of its worker saw it. pid: of the worker."""

    device: str
    worker: str
    pool: str
    capacity_class: str
    host: str
    pid: int
    id: uuid.UUID = field(default_factory=uuid.uuid4)


def note_loss(session: Session, loss: Loss, *, ago_s: float = 0.0) -> None:
    """Note that a device was lost, and quarantine it if that happened a short time before, too.

    Harmless when repeated. ago_s: seconds since it was lost. The worker has ended, so its row goes.
    """
    lost_at = session.scalars(select(func.clock_timestamp())).one() - timedelta(seconds=ago_s)
    row = session.get(LostDevice, loss.device, with_for_update=True)
    if row is not None and row.loss == loss.id:
        return
    is_second = row is not None and lost_at - row.lost_at < LOST_TWICE_WITHIN
    if row is None:
        row = LostDevice(device=loss.device)
        session.add(row)
    row.loss = loss.id
    row.lost_at = lost_at
    row.worker = loss.worker
    row.pool = loss.pool
    row.capacity_class = loss.capacity_class
    row.host = loss.host
    its_row = (Worker.name == loss.worker, Worker.host == loss.host, Worker.pid == loss.pid)
    session.execute(delete(Worker).where(*its_row))
    if is_second and row.quarantined_at is None:
        hours = round(LOST_TWICE_WITHIN.total_seconds() / 3600)
        row.quarantined_at = lost_at
        row.problem = (
            f"device {loss.device} of host {loss.host} was lost twice within {hours} hours, and no"
            f" worker is started on it; repair it, then: darkroom workers release {loss.device}"
        )
        audit.append(
            session,
            EventName.DEVICE_QUARANTINE_STARTED,
            chain=audit.SYSTEM,
            actor=loss.worker,
            device=loss.device,
            host=loss.host,
        )


def quarantined_of(session: Session, devices: Collection[str]) -> set[str]:
    """Return those of the devices that get no worker."""
    query = select(LostDevice.device).where(
        LostDevice.device.in_(devices), LostDevice.quarantined_at.is_not(None)
    )
    return set(session.scalars(query))


def count_by_pool(session: Session) -> Counter[str]:
    """Count the devices that get no worker, by the pool of the worker that lost each last."""
    query = select(LostDevice.pool).where(LostDevice.quarantined_at.is_not(None))
    return Counter(session.scalars(query))


def release(session: Session, named: str, *, actor: str) -> Sequence[LostDevice]:
    """Have workers started again on a device; return what was released.

    named: the device, or the worker that lost it last.  Its losses until now count no more.
    """
    is_named = or_(LostDevice.device == named, LostDevice.worker == named)
    query = select(LostDevice).where(is_named, LostDevice.quarantined_at.is_not(None))
    found = session.scalars(query.order_by(LostDevice.device).with_for_update()).all()
    for row in found:
        session.delete(row)
        audit.append(
            session,
            EventName.DEVICE_QUARANTINE_ENDED,
            chain=audit.SYSTEM,
            actor=actor,
            device=row.device,
            host=row.host,
        )
    return found
