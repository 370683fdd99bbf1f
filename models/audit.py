"""Append facts to the audit log; facts are ids and numbers, never prompts or addresses.

The database links each event to the one before it in its chain (a tenant's, or `system`): see
models/sql/functions/audit_link.sql.
"""

import uuid
from typing import Any

from sqlalchemy import insert
from sqlalchemy.orm import Session

from models.audit_events import EventName
from models.ids import new_id
from models.tables import AuditEvent, Job

SYSTEM = "system"


def append(
    session: Session,
    event: EventName,
    *,
    chain: uuid.UUID | str,
    actor: str,
    job_id: uuid.UUID | None = None,
    attempt: int | None = None,
    **facts: Any,
) -> None:
    """Append one event to `chain`.

    The chain's head stays locked until commit: call this last, and chains in sorted order.
    """
    session.flush()  # whatever the event speaks of is written before it
    row = {
        "id": new_id(),
        "chain_id": str(chain),
        "event": event,
        "actor": actor,
        "job_id": job_id,
        "attempt": attempt,
        "facts": facts,
    }
    # The trigger fills in the last three columns, before NOT NULL is checked; SQLAlchemy would
    # leave out columns without a value.
    session.execute(insert(AuditEvent).values(**row, seq=0, prev_hash=b"", hash=b""))


def append_of_attempt(
    session: Session, event: EventName, job: Job, *, actor: str, **facts: Any
) -> None:
    """Append one event about the job's newest attempt to its tenant's chain, as `append` does."""
    append(
        session,
        event,
        chain=job.tenant_id,
        actor=actor,
        job_id=job.id,
        attempt=job.attempt,
        **facts,
    )
