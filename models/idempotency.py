"""A request under a key of the tenant's own comes to one answer, however often and from however many places it is sent.

The entry is written in the transaction that inserts what the request asked for: one that fails leaves none, and one that comes meanwhile
waits for the first to commit. Only the tenant's own lock is taken before its row.
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
    INSERT INTO idempotency_keys AS k (tenant_id, key, request_sha256) VALUES (:tenant_id, :key, :request_sha256)
    ON CONFLICT (tenant_id, key) DO UPDATE SET
        request_sha256 = excluded.request_sha256, job_id = NULL, answer = NULL, created_at = clock_timestamp()
        WHERE :renew OR k.created_at <= clock_timestamp() - make_interval(secs => :kept_for_s)
    RETURNING true
    """
)

_FORGET = text(
    """
    DELETE FROM idempotency_keys WHERE (tenant_id, key) IN (
        SELECT tenant_id, key FROM idempotency_keys WHERE created_at <= (SELECT clock_timestamp() - make_interval(secs => :older_than_s))
        ORDER BY created_at LIMIT :limit FOR UPDATE SKIP LOCKED
    )
    """
)


@dataclass(frozen=True)
class Once:
    """A request that must come to one answer. request_sha256: of what it asks for, in canonical form, not of its bytes.

    renew: what is there under the key counts no more; this request takes its place.
    """

    key: str
    request_sha256: str
    renew: bool = False


@dataclass(frozen=True)
class Answer:
    """What a request came to: a job, or of a batch what each item came to."""

    job_id: uuid.UUID | None
    items: Mapping[str, Any] | None


class KeyReused(Exception):
    """The key came before with another request; nothing was changed."""


class AlreadyAnswered(Exception):
    """Somebody else's transaction came first."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(f"answered with job {answer.job_id}")
        self.answer = answer


def look_up(session: Session, once: Once, *, tenant_id: uuid.UUID) -> Answer | None:
    """What the same request came to before; None if it is new, or to be renewed. Raises KeyReused."""
    if once.renew:
        return None
    oldest = func.clock_timestamp() - func.make_interval(0, 0, 0, 0, 0, 0, KEPT_FOR_S)
    return _answer(
        session, once, IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.created_at > oldest
    )


def claim(session: Session, once: Once, *, tenant_id: uuid.UUID) -> None:
    """Take the key for this transaction, before any other row; `fulfil` it before the end.

    Waits for another transaction that has it. Raises AlreadyAnswered when that one came to an answer, or KeyReused.
    """
    row = {"tenant_id": tenant_id, "key": once.key, "request_sha256": once.request_sha256}
    if session.scalar(_CLAIM, {**row, "renew": once.renew, "kept_for_s": KEPT_FOR_S}):
        return
    answer = _answer(session, once, IdempotencyKey.tenant_id == tenant_id)
    assert answer is not None  # the conflict locked its row
    raise AlreadyAnswered(answer)


def fulfil(
    session: Session,
    once: Once,
    *,
    tenant_id: uuid.UUID,
    job_id: uuid.UUID | None = None,
    answer: Mapping[str, Any] | None = None,
) -> None:
    """Note what the claimed key came to: a job, or the answer to a batch."""
    is_it = (IdempotencyKey.tenant_id == tenant_id, IdempotencyKey.key == once.key)
    session.execute(
        update(IdempotencyKey)
        .where(*is_it)
        .values(job_id=job_id, answer=dict(answer) if answer is not None else None)
    )


def forget_old(session: Session, *, limit: int) -> int:
    """Delete up to `limit` entries whose day is over; how many there were."""
    return session.execute(_FORGET, {"older_than_s": KEPT_FOR_S, "limit": limit}).rowcount  # type: ignore[attr-defined,no-any-return]


def _answer(session: Session, once: Once, *is_it: ColumnElement[bool]) -> Answer | None:
    columns = (IdempotencyKey.request_sha256, IdempotencyKey.job_id, IdempotencyKey.answer)
    row = session.execute(
        select(*columns).where(IdempotencyKey.key == once.key, *is_it)
    ).one_or_none()
    if row is not None and row.request_sha256 != once.request_sha256:
        raise KeyReused
    return Answer(row.job_id, row.answer) if row is not None else None
