"""Append facts to the audit log. Names read `subject:aspect:past-tense`; facts are ids and numbers, never prompts or addresses.

The database links each event to the one before it in its chain (a tenant's, or `system`): see the first migration.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from models.ids import new_id
from models.tables import AuditEvent

SYSTEM = "system"


@dataclass(frozen=True)
class Event:
    """What happened, who did it, to which job."""

    event: str
    actor: str
    job_id: uuid.UUID | None = None
    attempt: int | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)


def append(
    session: Session,
    event: str,
    *,
    chain: uuid.UUID | str,
    actor: str,
    job_id: uuid.UUID | None = None,
    attempt: int | None = None,
    **facts: Any,
) -> None:
    """Append one event to `chain`. The chain's head stays locked until commit: call this last, chains in sorted order."""
    append_all(session, [Event(event, actor, job_id, attempt, facts)], chain=chain)


def append_all(session: Session, events: Sequence[Event], *, chain: uuid.UUID | str) -> None:
    """Append them to one chain, in their order, as `append` would one by one."""
    session.flush()  # whatever the events speak of is written before them
    # What the trigger fills in must still be named: NOT NULL is checked after it, but SQLAlchemy would leave the columns out.
    linked = {"chain_id": str(chain), "seq": 0, "prev_hash": b"", "hash": b""}
    session.execute(insert(AuditEvent), [{"id": new_id(), **asdict(event), **linked} for event in events])
