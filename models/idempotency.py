"""Give a request under an idempotency key one answer, however often it is sent and from where.

The entry is written in the transaction that inserts what the request asked for: one that fails
leaves none, and a concurrent request under the same key waits for the first to commit. Only the
tenant's own lock is taken before its row.
"""

import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, func, select, text, update
from sqlalchemy.orm import Session

from models.tables import IdempotencyKey

KEPT_FOR_S = 86_400.0

_CLAIM = text(
    """
    INSERT INTO idempotency_keys AS k (tenant_id, key, request_sha256)
    VALUES (:tenant_id, :key, :request_sha256)
    ON CONFLICT (tenant_id, key) DO UPDATE SET
        request_sha256 = excluded.request_sha256,
        job_id = NULL,
        answer = NULL,
        created_at = clock_timestamp()
        WHERE :renew OR k.created_at <= clock_timestamp() - make_interval(secs => :kept_for_s)
    RETURNING true
    """
)

_FORGET = text(
    """
    DELETE FROM idempotency_keys WHERE (tenant_id, key) IN (
        SELECT tenant_id, key FROM idempotency_keys
        WHERE created_at <= (SELECT clock_timestamp() - make_interval(secs => :older_than_s))
        ORDER BY created_at LIMIT :limit FOR UPDATE SKIP LOCKED
    )
    """
)


@dataclass(frozen=True)
class IdempotentRequest:
    """A request that must come to one answer.

    request_sha256: of what it asks for, in canonical form, not of its bytes.  renew: an earlier
    answer under the key counts no more; this request takes its place.
    """

    key: str
    request_sha256: str
    renew: bool = False


@dataclass(frozen=True)
class StoredAnswer:
    """The answer to a request: a job, or the answer to each item of a batch."""

    job_id: uuid.UUID | None
    items: Mapping[str, Any] | None


class KeyReused(Exception):
    """The key came before with another request; nothing was changed."""


class AlreadyAnswered(Exception):
    """Another transaction answered the request first."""

    def __init__(self, answer: StoredAnswer) -> None:
        super().__init__(f"answered with job {answer.job_id}")
        self.answer = answer


def look_up(
    session: Session, idempotent: IdempotentRequest, *, tenant_id: uuid.UUID
) -> StoredAnswer | None:
    """Find the answer to the same request; None if it is new, or to be renewed.

    Raises KeyReused.
    """
    if idempotent.renew:
        return None
    oldest = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, KEPT_FOR_S)
    conditions = (IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.created_at > oldest)
    return _answer(session, idempotent, *conditions)


def claim(session: Session, idempotent: IdempotentRequest, *, tenant_id: uuid.UUID) -> None:
    """Take the key for this transaction, before any other row; `fulfil` it before the end.

    Waits for another transaction that has it. Raises AlreadyAnswered when that one came to an
    answer, or KeyReused.
    """
    row = {
        "tenant_id": tenant_id,
        "key": idempotent.key,
        "request_sha256": idempotent.request_sha256,
    }
    if session.scalar(_CLAIM, {**row, "renew": idempotent.renew, "kept_for_s": KEPT_FOR_S}):
        return
    answer = _answer(session, idempotent, IdempotencyKey.tenant_id == tenant_id)
    assert answer is not None  # the conflict locked its row
    raise AlreadyAnswered(answer)


def fulfil(
    session: Session,
    idempotent: IdempotentRequest,
    *,
    tenant_id: uuid.UUID,
    job_id: uuid.UUID | None = None,
    answer: Mapping[str, Any] | None = None,
) -> None:
    """Note the answer to the claimed key: a job, or the answer to a batch."""
    conditions = (IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == idempotent.key)
    items = dict(answer) if answer is not None else None
    session.execute(update(IdempotencyKey).where(*conditions).values(job_id=job_id, answer=items))


def forget_old(session: Session, *, limit: int) -> int:
    """Delete up to `limit` entries whose day is over; return how many there were."""
    result = session.execute(_FORGET, {"older_than_s": KEPT_FOR_S, "limit": limit})
    # This is a CursorResult, which `execute` is not typed to return.
    return result.rowcount  # type: ignore[attr-defined,no-any-return]


def _answer(
    session: Session, idempotent: IdempotentRequest, *conditions: ColumnElement[bool]
) -> StoredAnswer | None:
    columns = (IdempotencyKey.request_sha256, IdempotencyKey.job_id, IdempotencyKey.answer)
    query = select(*columns).where(IdempotencyKey.key == idempotent.key, *conditions)
    row = session.execute(query).one_or_none()
    if row is not None and row.request_sha256 != idempotent.request_sha256:
        raise KeyReused
    return StoredAnswer(row.job_id, row.answer) if row is not None else None
