"""API keys: `dr_<kid>_<secret><check>`. The key is shown once; stored are its public id and an HMAC of the whole.

A key has 256 random bits, so a fast keyed hash is enough: scrypt would cost 80 ms a request and buy nothing. The six
check characters refuse a typo without a query and let secret scanners be sure.
"""

import hashlib
import hmac
import secrets
import string
import uuid
import zlib
from datetime import datetime

from sqlalchemy import func, select, update
from sqlalchemy.orm import Session

from models import audit
from models.tables import ApiKey

_ALPHABET = string.digits + string.ascii_letters
_KID_CHARS, _SECRET_CHARS, _CHECK_CHARS = 12, 43, 6


def issue(
    session: Session, *, tenant_id: uuid.UUID, name: str, pepper: str, expires_at: datetime | None = None, actor: str = "cli"
) -> tuple[ApiKey, str]:
    """A new key of the tenant: the row, and the key itself, which nobody can show again."""
    kid, secret = _random(_KID_CHARS), _random(_SECRET_CHARS)
    body = f"dr_{kid}_{secret}"
    key = body + _check(body)
    row = ApiKey(tenant_id=tenant_id, kid=kid, name=name, digest=_digest(pepper, key), expires_at=expires_at)
    session.add(row)
    session.flush()
    audit.append(session, "api-key:secret:issued", chain=tenant_id, actor=actor, api_key_id=str(row.id), kid=kid)
    return row, key


def authenticate(session: Session, key: str, *, pepper: str) -> ApiKey | None:
    """The live key that `key` is, or None: unknown, mistyped, revoked and expired look alike."""
    if not key.isascii() or _check(key[:-_CHECK_CHARS]) != key[-_CHECK_CHARS:]:
        return None
    parts = key.split("_")
    if len(parts) != 3 or parts[0] != "dr" or not parts[1].isalnum():
        return None
    row = session.scalar(
        select(ApiKey).where(
            ApiKey.kid == parts[1],
            ApiKey.revoked_at.is_(None),
            (ApiKey.expires_at.is_(None)) | (ApiKey.expires_at > func.clock_timestamp()),
        )
    )
    return row if row is not None and hmac.compare_digest(row.digest, _digest(pepper, key)) else None


def revoke(session: Session, key_id: uuid.UUID, *, actor: str = "cli") -> ApiKey | None:
    """Refuse the key from now on; None if there is no such live key."""
    statement = update(ApiKey).where(ApiKey.id == key_id, ApiKey.revoked_at.is_(None)).values(revoked_at=func.clock_timestamp())
    row = session.scalar(statement.returning(ApiKey))
    if row is not None:
        audit.append(session, "api-key:secret:revoked", chain=row.tenant_id, actor=actor, api_key_id=str(row.id), kid=row.kid)
    return row


def of_tenant(session: Session, tenant_id: uuid.UUID) -> list[ApiKey]:
    """The tenant's keys, oldest first, revoked ones included."""
    return list(session.scalars(select(ApiKey).where(ApiKey.tenant_id == tenant_id).order_by(ApiKey.id)))


def _random(length: int) -> str:
    return "".join(secrets.choice(_ALPHABET) for _ in range(length))


def _check(body: str) -> str:
    rest, letters = zlib.crc32(body.encode()), ""
    for _ in range(_CHECK_CHARS):
        rest, digit = divmod(rest, len(_ALPHABET))
        letters += _ALPHABET[digit]
    return letters


def _digest(pepper: str, key: str) -> bytes:
    return hmac.digest(pepper.encode(), key.encode(), hashlib.sha256)
