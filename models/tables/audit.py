"""Define the audit log and the heads of its chains."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import BigInteger, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from models.ids import new_id
from models.tables.base import NOW, Base


class AuditEvent(Base):
    """An appended fact.

    A trigger sets `seq`, `prev_hash` and `hash`; values that an application gives are overwritten.
    """

    __tablename__ = "audit_events"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    at: Mapped[datetime] = mapped_column(primary_key=True, server_default=NOW)
    chain_id: Mapped[str]
    seq: Mapped[int] = mapped_column(BigInteger)
    event: Mapped[str]
    actor: Mapped[str]
    job_id: Mapped[uuid.UUID | None]
    attempt: Mapped[int | None]
    facts: Mapped[dict[str, Any]]
    prev_hash: Mapped[bytes]
    hash: Mapped[bytes]

    # The app role may INSERT and not SELECT, so no RETURNING.
    __table_args__ = (
        Index("audit_events_by_chain", "chain_id", "seq"),
        Index("audit_events_by_job", "job_id"),
        {"implicit_returning": False, "postgresql_partition_by": "RANGE (at)"},
    )


class AuditCheckpoint(Base):
    """An event that was pruned with its month and that a later one links to.

    Written where months are pruned, by the owner alone.
    """

    __tablename__ = "audit_checkpoints"

    chain_id: Mapped[str] = mapped_column(primary_key=True)
    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    hash: Mapped[bytes]


class AuditChain(Base):
    """The head of a chain, which the next event links to. Only the trigger writes it."""

    __tablename__ = "audit_chains"

    chain_id: Mapped[str] = mapped_column(primary_key=True)
    last_seq: Mapped[int] = mapped_column(BigInteger, server_default=text("0"))
    last_hash: Mapped[bytes] = mapped_column(server_default=text(r"'\x'::bytea"))
