"""Who is asking: API keys as Bearer tokens."""

from dataclasses import dataclass
from uuid import UUID

import structlog
from flask import g, request

from app.gateway import gateway
from app.problems import Unauthenticated
from models import api_keys
from models.database import transaction


@dataclass(frozen=True)
class Caller:
    """The tenant of this request and the key that spoke for it; `actor` is how the audit log names it."""

    tenant_id: UUID
    api_key_id: UUID
    actor: str


def require_key() -> None:
    """Set `g.caller`, or raise Unauthenticated: unknown, revoked and expired keys look alike."""
    scheme, _, key = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthenticated("Send your API key as `Authorization: Bearer dr_…`.")
    parts = gateway()
    with transaction(parts.database) as session:
        row = api_keys.authenticate(session, key.strip(), pepper=parts.settings.api_key_pepper.get_secret_value())
    if row is None:
        raise Unauthenticated("This API key is unknown, revoked or expired.")
    g.caller = Caller(tenant_id=row.tenant_id, api_key_id=row.id, actor=f"key:{row.kid}")
    structlog.contextvars.bind_contextvars(tenant_id=str(row.tenant_id))


def caller() -> Caller:
    """Who `require_key` found."""
    found: Caller = g.caller
    return found
