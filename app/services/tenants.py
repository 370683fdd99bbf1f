"""Manage tenants, their limits and their API keys, for operators."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from app.caller import Caller
from app.problems import InvalidRequest, KeyNotFound, TenantExists, TenantNotFound
from app.runtime import Runtime
from models import api_keys, tenants
from models.database import run_transaction, transaction
from models.tables import ApiKey, Tenant
from policy.limits import OFFERED, InvalidLimits


def page(runtime: Runtime, *, limit: int, before: UUID | None) -> Sequence[Tenant]:
    """List up to `limit` tenants, newest first, older than `before`."""
    with transaction(runtime.database) as session:
        return tenants.page(session, limit=limit, before=before)


def create(runtime: Runtime, caller: Caller, *, name: str, weight: float) -> Tenant:
    """Add a tenant, without limits and without keys. Raises TenantExists."""

    def add(session: Session) -> Tenant:
        tenant = tenants.create(session, name=name, weight=weight, actor=caller.actor)
        session.refresh(tenant)
        return tenant

    try:
        return run_transaction(runtime.database, add)
    except IntegrityError:
        raise TenantExists(f"A tenant named {name!r} exists already.") from None


def find(runtime: Runtime, tenant_id: UUID) -> Tenant:
    """Return the tenant with its limits. Raises TenantNotFound."""
    with transaction(runtime.database) as session:
        return find_in(session, tenant_id)


def find_in(session: Session, tenant_id: UUID) -> Tenant:
    """Return the tenant, read in this session. Raises TenantNotFound."""
    tenant = session.get(Tenant, tenant_id)
    if tenant is None:
        raise TenantNotFound(f"There is no tenant {tenant_id}.")
    return tenant


def change(
    runtime: Runtime,
    caller: Caller,
    tenant_id: UUID,
    *,
    weight: float | None,
    limits: Mapping[str, Any],
) -> Tenant:
    """Change the tenant's weight and limits; every process knows within a second.

    weight: None keeps it. limits: the fields of `Limits` that change; None removes a limit. Raises
    InvalidRequest and TenantNotFound.
    """
    _check_offered(runtime, limits)

    def apply(session: Session) -> Tenant:
        tenant = find_in(session, tenant_id)
        if weight is not None:
            tenants.set_weight(session, tenant, weight=weight, actor=caller.actor)
        if limits:
            tenants.limit(session, tenant, changes=limits, actor=caller.actor)
        return tenant

    try:
        return run_transaction(runtime.database, apply)
    except InvalidLimits as error:
        raise InvalidRequest.at(error.field, error.detail) from None


def list_keys_of(runtime: Runtime, tenant_id: UUID) -> Sequence[ApiKey]:
    """List the tenant's keys, oldest first, revoked ones included. Raises TenantNotFound."""
    with transaction(runtime.database) as session:
        find_in(session, tenant_id)
        return api_keys.of_tenant(session, tenant_id)


def issue_key(
    runtime: Runtime,
    caller: Caller,
    tenant_id: UUID,
    *,
    name: str,
    scopes: Sequence[str],
    expires_at: datetime | None,
) -> tuple[ApiKey, str]:
    """Add a key; return its row and the key itself, which is not stored and cannot be shown again.

    Raises TenantNotFound.
    """

    def issue(session: Session) -> tuple[ApiKey, str]:
        row, key = api_keys.issue(
            session,
            tenant_id=find_in(session, tenant_id).id,
            name=name,
            scopes=sorted(set(scopes)),
            expires_at=expires_at,
            pepper=_pepper(runtime),
            actor=caller.actor,
        )
        session.refresh(row)
        return row, key

    return run_transaction(runtime.database, issue)


def rotate_key(
    runtime: Runtime, caller: Caller, key_id: UUID, *, grace_s: float
) -> tuple[ApiKey, str]:
    """Add a key with the name and scopes of this one, which stays valid for `grace_s`.

    Return the new row and the new key. Raises KeyNotFound.
    """

    def rotate(session: Session) -> tuple[ApiKey, str]:
        pepper = _pepper(runtime)
        rotated = api_keys.rotate(
            session, key_id, pepper=pepper, grace_s=grace_s, actor=caller.actor
        )
        if rotated is None:
            raise _key_not_found(key_id)
        session.refresh(rotated[0])
        return rotated

    return run_transaction(runtime.database, rotate)


def revoke_key(runtime: Runtime, caller: Caller, key_id: UUID) -> None:
    """Revoke the key; every process refuses it within a second. Raises KeyNotFound."""
    row = run_transaction(
        runtime.database,
        lambda session: api_keys.revoke(session, key_id, actor=caller.actor),
    )
    if row is None:
        raise _key_not_found(key_id)


def _check_offered(runtime: Runtime, limits: Mapping[str, Any]) -> None:
    """Check that the limits name tiers and models of fleet.toml. Raises InvalidRequest."""
    for name, note in OFFERED.items():
        said = limits.get(name)
        offered = getattr(runtime.fleet, note.section)
        if said is not None and (not said or set(said) - offered.keys()):
            detail = "must name at least one, and only names from fleet.toml"
            raise InvalidRequest.at(name, detail, accepted=list(offered))


def _pepper(runtime: Runtime) -> str:
    return runtime.settings.api_key_pepper.get_secret_value()


def _key_not_found(key_id: UUID) -> KeyNotFound:
    return KeyNotFound(f"There is no valid key with the id {key_id}.")
