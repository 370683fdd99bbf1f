"""Tenants."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from models import audit
from models.tables import Tenant


def create(session: Session, *, name: str, weight: float = 1.0, actor: str = "cli") -> Tenant:
    """A new tenant; its audit chain begins with this event. IntegrityError if the name is taken."""
    tenant = Tenant(name=name, weight=weight)
    session.add(tenant)
    session.flush()
    audit.append(session, "tenant:record:created", chain=tenant.id, actor=actor, tenant_id=str(tenant.id))
    return tenant


def weigh(session: Session, tenant: Tenant, *, weight: float, actor: str = "cli") -> None:
    """Give the tenant another weight in fair order; jobs that wait keep the places they have."""
    was, tenant.weight = tenant.weight, weight
    audit.append(session, "tenant:weight:changed", chain=tenant.id, actor=actor, was=was, weight=weight)


def by_name(session: Session, name: str) -> Tenant | None:
    return session.scalar(select(Tenant).where(Tenant.name == name))


def all_of_them(session: Session) -> list[Tenant]:
    """Every tenant, oldest first."""
    return list(session.scalars(select(Tenant).order_by(Tenant.id)))
