"""What the tests of this room ask the database."""

import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session


def events_of(session: Session, job_id: uuid.UUID) -> list[str]:
    """The job's audit events, oldest first."""
    return list(session.scalars(text("SELECT event FROM audit_log WHERE job_id = :job_id ORDER BY seq"), {"job_id": job_id}))


def attempt_of(session: Session, job_id: uuid.UUID, number: int = 1) -> Any:
    """The record of one attempt."""
    query = text("SELECT * FROM attempts WHERE job_id = :job_id AND attempt = :number")
    return session.execute(query, {"job_id": job_id, "number": number}).one()


def at_once(*acts: Callable[[], Any]) -> list[Any]:
    """What the acts return when they all start at the same moment, each in a thread of its own."""
    line = Barrier(len(acts))

    def start(act: Callable[[], Any]) -> Any:
        line.wait()
        return act()

    with ThreadPoolExecutor(len(acts)) as threads:
        return [future.result() for future in [threads.submit(start, act) for act in acts]]
