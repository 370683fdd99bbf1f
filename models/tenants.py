"""Tenants."""

from sqlalchemy import select
from sqlalchemy.orm import Session

from models import audit
from models.tables import Tenant


def create(session: Session, *, name: str, actor: str = "cli") -> Tenant:
    """A new tenant; its audit chain begins with this event. IntegrityError if the name is taken."""
    tenant = Tenant(name=name)
    session.add(tenant)
    session.flush()
    audit.append(session, "tenant:record:created", chain=tenant.id, actor=actor, tenant_id=str(tenant.id))
    return tenant


def by_name(session: Session, name: str) -> Tenant | None:
    return session.scalar(select(Tenant).where(Tenant.name == name))


def all_of_them(session: Session) -> list[Tenant]:
    """Every tenant, oldest first."""
    return list(session.scalars(select(Tenant).order_by(Tenant.id)))
