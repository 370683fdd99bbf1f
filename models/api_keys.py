"""Issue, find and revoke API keys: `dr_<kid>_<secret><check>`.

A key is shown once; its public id (kid) and an HMAC of the whole key are stored. A key has 256
random bits, so a fast keyed hash is enough: scrypt would cost 80 ms a request and buy nothing. The
six check characters refuse a typo without a query and let secret scanners be sure.
"""

import hashlib
import hmac
import secrets
import string
import uuid
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import ARRAY, ColumnElement, Select, Text, any_, bindparam, func, select, update
from sqlalchemy.orm import Session

from models import audit
from models.audit_events import EventName
from models.tables import ApiKey, Tenant
from policy.limits import DEFAULT_SCOPES, LIMITS

_ALPHABET = string.digits + string.ascii_letters
USE_NOTED_EVERY_M = 5  # minutes
_KID_CHARS = 12
_SECRET_CHARS = 43
_CHECK_CHARS = 6


@dataclass(frozen=True)
class KnownKey:
    """A key that was live when it was looked up, and what it may do. expires_at: Unix seconds."""

    id: uuid.UUID
    tenant_id: uuid.UUID
    kid: str
    digest: bytes
    scopes: frozenset[str]
    expires_at: float | None
    is_use_to_be_noted: bool
    tenant: str  # its name
    limits: Mapping[str, Any]  # of its tenant, by the names of the columns

    def is_live(self, now: float) -> bool:
        """Tell whether the key is still live at `now`, in Unix seconds."""
        return self.expires_at is None or now < self.expires_at


def issue(
    session: Session,
    *,
    tenant_id: uuid.UUID,
    name: str,
    pepper: str,
    scopes: Sequence[str] = DEFAULT_SCOPES,
    expires_at: datetime | None = None,
    actor: str = "cli",
) -> tuple[ApiKey, str]:
    """Make a new key of the tenant; return its row, and the key, which is never shown again."""
    kid = _random(_KID_CHARS)
    secret = _random(_SECRET_CHARS)
    body = f"dr_{kid}_{secret}"
    key = body + _check(body)
    row = ApiKey(
        tenant_id=tenant_id,
        kid=kid,
        name=name,
        digest=_digest(pepper, key),
        scopes=sorted(scopes),
        expires_at=expires_at,
    )
    session.add(row)
    session.flush()
    audit.append(
        session,
        EventName.API_KEY_SECRET_ISSUED,
        chain=tenant_id,
        actor=actor,
        api_key_id=str(row.id),
        kid=kid,
        scopes=row.scopes,
    )
    return row, key


def rotate(
    session: Session, key_id: uuid.UUID, *, pepper: str, grace_s: float, actor: str = "cli"
) -> tuple[ApiKey, str] | None:
    """Replace a key by a new one with its name and scopes; the old one lives on for `grace_s`.

    Returns the new row and the new key; None if there is no such live key.
    """
    # Jobs are accepted under the key meanwhile: they only name it.
    old = session.scalar(
        select(ApiKey)
        .where(ApiKey.id == key_id, *_is_live())
        .with_for_update(of=ApiKey, key_share=True)
    )
    if old is None:
        return None
    row, key = issue(
        session,
        tenant_id=old.tenant_id,
        name=old.name,
        pepper=pepper,
        scopes=old.scopes,
        actor=actor,
    )
    ends_at = func.clock_timestamp() + func.make_interval(0, 0, 0, 0, 0, 0, grace_s)
    old.expires_at = func.least(func.coalesce(old.expires_at, ends_at), ends_at)
    session.flush()
    ids: dict[str, Any] = {"api_key_id": str(old.id), "kid": old.kid, "successor": str(row.id)}
    audit.append(session, EventName.API_KEY_SECRET_ROTATED, chain=old.tenant_id, actor=actor, **ids)
    return row, key


def kid_of(key: str) -> str | None:
    """Return the public id in a key; None if the text cannot be a key.

    So a typo is refused without a query.
    """
    if not key.isascii() or _check(key[:-_CHECK_CHARS]) != key[-_CHECK_CHARS:]:
        return None
    parts = key.split("_")
    return parts[1] if len(parts) == 3 and parts[0] == "dr" and parts[1].isalnum() else None


def verify_key(key: str, digest: bytes, *, pepper: str) -> bool:
    """Tell whether `digest` was made of `key`."""
    return hmac.compare_digest(digest, _digest(pepper, key))


def look_up(session: Session, kids: Sequence[str]) -> dict[str, KnownKey]:
    """Find the live keys with these public ids; plain values by public id, others left out."""
    return {row[2]: _known(row) for row in session.execute(_LOOK_UP, {"kids": list(kids)})}


def note_use(session: Session, key_ids: Sequence[uuid.UUID]) -> None:
    """Note that the keys were used just now.

    A key that another transaction is writing to is left to the next time.
    """
    free = (
        select(ApiKey.id)
        .where(ApiKey.id.in_(key_ids))
        .with_for_update(skip_locked=True, key_share=True)
    )
    session.execute(
        update(ApiKey).where(ApiKey.id.in_(free)).values(last_used_at=func.clock_timestamp())
    )


def revoke(session: Session, key_id: uuid.UUID, *, actor: str = "cli") -> ApiKey | None:
    """Refuse the key from now on; None if there is no such live key."""
    statement = (
        update(ApiKey)
        .where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None))
        .values(revoked_at=func.clock_timestamp())
    )
    row = session.scalar(statement.returning(ApiKey))
    if row is not None:
        audit.append(
            session,
            EventName.API_KEY_SECRET_REVOKED,
            chain=row.tenant_id,
            actor=actor,
            api_key_id=str(row.id),
            kid=row.kid,
        )
    return row


def of_tenant(session: Session, tenant_id: uuid.UUID) -> list[ApiKey]:
    """List the tenant's keys, oldest first, revoked ones included."""
    return list(
        session.scalars(select(ApiKey).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.id))
    )


def _look_up_statement() -> Select[Any]:
    """Make the query of `look_up`, once: a gateway looks its keys up all the time."""
    stale = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, USE_NOTED_EVERY_M)
    is_stale = func.coalesce(ApiKey.last_used_at < stale, True)
    key = (
        ApiKey.id,
        ApiKey.tenant_id,
        ApiKey.kid,
        ApiKey.digest,
        ApiKey.scopes,
        ApiKey.expires_at,
        is_stale,
    )
    limits = [getattr(Tenant, name) for name in LIMITS]
    query = select(*key, Tenant.name, *limits).join(Tenant, Tenant.id == ApiKey.tenant_id)
    return query.where(ApiKey.kid == any_(bindparam("kids", type_=ARRAY(Text))), *_is_live())


def _known(row: Sequence[Any]) -> KnownKey:
    expires_at = row[5].timestamp() if row[5] is not None else None
    return KnownKey(
        id=row[0],
        tenant_id=row[1],
        kid=row[2],
        digest=row[3],
        scopes=frozenset(row[4]),
        expires_at=expires_at,
        is_use_to_be_noted=row[6],
        tenant=row[7],
        limits=dict(zip(LIMITS, row[8:], strict=True)),
    )


def _is_live() -> tuple[ColumnElement[bool], ...]:
    never_expires = ApiKey.expires_at.is_(None)
    not_expired = never_expires | (ApiKey.expires_at > func.clock_timestamp())
    return ApiKey.revoked_at.is_(None), not_expired


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _check(body: str) -> str:
    rest = zlib.crc32(body.encode())
    letters = ""
    for _ in range(_CHECK_CHARS):
        rest, digit = divmod(rest, len(_ALPHABET))
        letters += _ALPHABET[digit]
    return letters


def _digest(pepper: str, key: str) -> bytes:
    return hmac.digest(pepper.encode(), key.encode(), hashlib.sha256)


_LOOK_UP = _look_up_statement()
