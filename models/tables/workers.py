"""Define the table of live workers."""

from datetime import datetime
from typing import Any

from sqlalchemy import Index, text
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import NOW, Base


class Worker(Base):
    """A worker that says it is alive every few seconds; its slots are the pool's capacity."""

    __tablename__ = "workers"

    name: Mapped[str] = mapped_column(primary_key=True)
    pool: Mapped[str]
    device: Mapped[str]
    slots: Mapped[int] = mapped_column()
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    seen_at: Mapped[datetime] = mapped_column(server_default=NOW)
    # Without a word: then it counts as gone.
    silent_after_s: Mapped[float] = mapped_column(server_default=text("15"), default=15.0)
    facts: Mapped[dict[str, Any]]

    __table_args__ = (Index("workers_by_pool", "pool", "seen_at"),)
