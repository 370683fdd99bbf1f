"""Keep the revisions of the fleet: each text of fleet.toml that was applied, in order.

Append-only. The revision with the highest number is in force; every process follows it
(dispatch/following.py). To go back is to apply an older text again.
"""

import hashlib
import uuid
from collections.abc import Collection, Sequence
from typing import Any

from sqlalchemy import func, literal, select, text
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Session

from models import audit
from models.audit_events import EventName
from models.tables import FleetRevision, Job, Tenant
from policy.revisions import QueuedKind
from policy.states import JobState

# Of who applies, until the end of the transaction.
_ONE_AT_A_TIME = text("SELECT pg_advisory_xact_lock(hashtext('fleet_revisions'))")


# Whoever goes by a file of its own (FOLLOW_REVISIONS=false) answers for its jobs itself.
_IS_QUEUED = (Job.state == JobState.QUEUED, Job.fleet_revision.is_not(None))


_ADAPTERS = func.coalesce(  # their names
    func.jsonb_path_query_array(Job.adapters, "$[*].name", type_=JSONB), literal([], JSONB)
)


class NoRevision(LookupError):
    """There is no revision with the number that was named."""


def newest_number(session: Session) -> int:
    """Return the number of the revision in force; 0 if none was ever applied."""
    return session.scalar(select(func.coalesce(func.max(FleetRevision.number), 0))) or 0


def newest(session: Session) -> FleetRevision | None:
    """Return the revision in force; None if none was ever applied."""
    return session.scalar(select(FleetRevision).order_by(FleetRevision.number.desc()).limit(1))


def find(session: Session, number: int) -> FleetRevision:
    """Return one revision. Raises NoRevision."""
    revision = session.get(FleetRevision, number)
    if revision is None:
        raise NoRevision(f"there is no revision {number}; `darkroom fleet history` lists them")
    return revision


def history(session: Session, *, most: int = 100) -> Sequence[FleetRevision]:
    """List the revisions, the newest first."""
    query = select(FleetRevision).order_by(FleetRevision.number.desc()).limit(most)
    return session.scalars(query).all()


def apply(
    session: Session,
    content: str,
    *,
    actor: str,
    note: str | None = None,
    rollback_of: int | None = None,
) -> tuple[FleetRevision, bool]:
    """Put this text in force, unless it is already; return its revision, and whether it is new.

    The caller has parsed the text. Two that apply at once get two numbers, in order.
    """
    session.execute(_ONE_AT_A_TIME)
    digest = hashlib.sha256(content.encode()).hexdigest()
    before = newest(session)
    if before is not None and before.sha256 == digest:
        return before, False
    revision = FleetRevision(
        content=content, sha256=digest, actor=actor, note=note, rollback_of=rollback_of
    )
    session.add(revision)
    session.flush()
    told = {"number": revision.number, "sha256": digest, "note": note, "rollback_of": rollback_of}
    facts: dict[str, Any] = {name: value for name, value in told.items() if value is not None}
    audit.append(
        session,
        EventName.FLEET_REVISION_APPLIED,
        chain=audit.SYSTEM,
        actor=actor,
        **facts,
    )
    return revision, True


def has_queued_in(session: Session, pools: Collection[str]) -> bool:
    """Tell whether a job of some revision is queued in one of these pools."""
    query = select(Job.id).where(*_IS_QUEUED, Job.pool.in_(pools))
    return session.scalar(query.limit(1)) is not None


def queued_of(session: Session, kind: QueuedKind, *, most: int) -> list[uuid.UUID]:
    """List queued jobs of one kind, the oldest first."""
    conditions = (
        *_IS_QUEUED,
        Job.pool == kind.pool,
        Job.model == kind.model,
        Job.model_version == kind.model_version,
        Job.tier == kind.tier,
        Tenant.name == kind.tenant,
        Job.width_px == kind.width_px,
        Job.height_px == kind.height_px,
        Job.sampler == kind.sampler,
        literal(list(kind.adapters), JSONB) == _ADAPTERS,
    )
    query = select(Job.id).join(Tenant, Tenant.id == Job.tenant_id).where(*conditions)
    return list(session.scalars(query.order_by(Job.id).limit(most)))


def kind_of(session: Session, job: Job) -> QueuedKind:
    """Say what of the fleet a job needs."""
    tenant = session.scalar(select(Tenant.name).where(Tenant.id == job.tenant_id)) or ""
    return QueuedKind(
        pool=job.pool,
        model=job.model,
        model_version=job.model_version,
        tier=job.tier,
        tenant=tenant,
        width_px=job.width_px,
        height_px=job.height_px,
        sampler=job.sampler,
        adapters=tuple(adapter["name"] for adapter in job.adapters or ()),
    )


def queued_kinds(session: Session) -> dict[QueuedKind, int]:
    """Count the queued jobs of all revisions by what of the fleet they need."""
    columns = (
        Job.pool,
        Job.model,
        Job.model_version,
        Job.tier,
        Tenant.name,
        Job.width_px,
        Job.height_px,
        Job.sampler,
        _ADAPTERS.label("adapter_names"),
    )
    query = select(*columns, func.count()).join(Tenant, Tenant.id == Job.tenant_id)
    # By their places: Postgres takes two that are given the same values for two expressions.
    places = [text(str(place)) for place in range(1, len(columns) + 1)]
    counted = query.where(*_IS_QUEUED).group_by(*places)
    return {
        QueuedKind._make([*kind, tuple(adapters)]): count
        for *kind, adapters, count in session.execute(counted)
    }
