"""Define the table of devices that were lost."""

import uuid
from datetime import datetime

from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import Base


class LostDevice(Base):
    """A device that a worker has lost, and whether workers are started on it at all.

    It has a row until an operator releases it.
    """

    __tablename__ = "lost_devices"

    # The UUID of a GPU or an instance of one; NUMBER@HOST where a launcher knows only that.
    device: Mapped[str] = mapped_column(primary_key=True)
    # Of the last loss: so that one that is written twice counts once.
    loss: Mapped[uuid.UUID]
    lost_at: Mapped[datetime]
    # The worker that lost it last, and where.
    worker: Mapped[str]
    pool: Mapped[str]
    capacity_class: Mapped[str]
    host: Mapped[str]
    # Since when no worker is started on it; None: one is.
    quarantined_at: Mapped[datetime | None]
    problem: Mapped[str | None]
