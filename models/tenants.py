"""Create tenants, change their weights and limits, list them."""

import uuid
from collections.abc import Collection, Mapping, Sequence
from decimal import Decimal
from typing import Any

from sqlalchemy import select
from sqlalchemy.orm import Session

from models import audit
from models.audit_events import EventName
from models.tables import Tenant
from policy.limits import LIMITS, as_column, check, limits_of


def create(session: Session, *, name: str, weight: float = 1.0, actor: str = "cli") -> Tenant:
    """Create a tenant; its audit chain begins with this event.

    Raises IntegrityError if the name is taken.
    """
    tenant = Tenant(name=name, weight=weight)
    session.add(tenant)
    session.flush()
    audit.append(
        session,
        EventName.TENANT_RECORD_CREATED,
        chain=tenant.id,
        actor=actor,
        tenant_id=str(tenant.id),
    )
    return tenant


def set_weight(session: Session, tenant: Tenant, *, weight: float, actor: str = "cli") -> None:
    """Give the tenant another weight in fair order; jobs that wait keep the places they have."""
    was = tenant.weight
    tenant.weight = weight
    audit.append(
        session,
        EventName.TENANT_WEIGHT_CHANGED,
        chain=tenant.id,
        actor=actor,
        was=was,
        weight=weight,
    )


def limit(
    session: Session, tenant: Tenant, *, changes: Mapping[str, Any], actor: str = "cli"
) -> None:
    """Change limits of the tenant, by the fields of `Limits`; None takes a limit away.

    They apply to its keys within a second. Raises InvalidLimits for limits that do not go together,
    and ValueError for a name that is no limit; nothing was changed then.
    """
    if unknown := changes.keys() - set(LIMITS):
        raise ValueError(f"{min(unknown)} is no limit")
    columns = {name: as_column(name, value) for name, value in changes.items()}
    # The limits that stay are checked together with the changes, so the row must not change.
    session.refresh(tenant, with_for_update={"key_share": True})
    check(limits_of({name: getattr(tenant, name) for name in LIMITS} | columns))
    for name, value in columns.items():
        setattr(tenant, name, value)
    session.flush()
    told = {
        name: float(value) if isinstance(value, Decimal) else value
        for name, value in columns.items()
    }
    audit.append(
        session, EventName.TENANT_LIMITS_CHANGED, chain=tenant.id, actor=actor, changes=told
    )


def page(session: Session, *, limit: int, before: uuid.UUID | None) -> Sequence[Tenant]:
    """List up to `limit` tenants, newest first, older than `before`."""
    query = select(Tenant) if before is None else select(Tenant).where(Tenant.id < before)
    return session.scalars(query.order_by(Tenant.id.desc()).limit(limit)).all()


def by_name(session: Session, name: str) -> Tenant | None:
    return session.scalar(select(Tenant).where(Tenant.name == name))


def unknown_names(session: Session, names: Collection[str]) -> list[str]:
    """Return those of the names that no tenant has, in their order."""
    known = set(session.scalars(select(Tenant.name).where(Tenant.name.in_(names))))
    return [name for name in names if name not in known]


def list_all(session: Session) -> list[Tenant]:
    """List every tenant, oldest first."""
    return list(session.scalars(select(Tenant).order_by(Tenant.id)))
