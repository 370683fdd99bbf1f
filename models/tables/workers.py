"""Define the tables of workers and of what they can do."""

import uuid
from datetime import datetime
from typing import Any

from sqlalchemy import CheckConstraint, Index, text
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import NOW, Base, listed
from policy.workers import WorkerState


class CheckpointCapabilities(Base):
    """What one version of a model can do, as the worker that loaded it last describes it."""

    __tablename__ = "capabilities"

    model: Mapped[str] = mapped_column(primary_key=True)
    version: Mapped[str] = mapped_column(primary_key=True)
    # As engine/capabilities.py writes it, and policy/capabilities.py reads it, with its source.
    described: Mapped[dict[str, Any]]
    worker: Mapped[str]  # its name
    published_at: Mapped[datetime] = mapped_column(server_default=NOW)


class Worker(Base):
    """A worker from its start to its end; the slots of live ones are the pool's capacity."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    pool: Mapped[str]
    # Of its pool; "": of none.
    capacity_class: Mapped[str] = mapped_column(server_default=text("''"), default="")
    device: Mapped[str]
    slots: Mapped[int] = mapped_column()
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    seen_at: Mapped[datetime] = mapped_column(server_default=NOW)
    # Without a word: then it counts as gone.
    silent_after_s: Mapped[float] = mapped_column(server_default=text("15"), default=15.0)
    facts: Mapped[dict[str, Any]]
    state: Mapped[str] = mapped_column(
        server_default=text(f"'{WorkerState.READY}'"), default=WorkerState.READY
    )
    # Of the process that has the name: the fence of every write to this row. None: a worker of the
    # previous version.
    instance: Mapped[uuid.UUID | None]
    # Where that process is: edges/processes.py.
    host: Mapped[str | None]
    pid: Mapped[int | None]
    process: Mapped[str | None]
    # Checkpoints that it serves, by name; None: all of its pool.
    held: Mapped[list[str] | None]
    # Those of them that are in its device's memory; None: all.
    loaded: Mapped[list[str] | None]
    # Why it does not serve others, by name.
    failed: Mapped[dict[str, Any]] = mapped_column(server_default=text("'{}'"), default=dict)
    # Under this name since the last that ended in good order, this one included.
    starts: Mapped[int] = mapped_column(server_default=text("1"), default=1)
    # In a row, before this one, that did not get ready.
    failed_starts: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    # Of the fleet that it goes by; None: of the file that it was started with.
    fleet_revision: Mapped[int | None]
    # For which it ended, to start anew; None once it is back.
    left_for_revision: Mapped[int | None]
    # Why the last start failed.
    problem: Mapped[str | None]

    __table_args__ = (
        Index("workers_by_pool", "pool", "seen_at"),
        CheckConstraint(f"state IN {listed(WorkerState)}", name="workers_state_is_known"),
    )
