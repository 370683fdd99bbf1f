"""Define the tables of devices: which were lost, and what their time was spent on."""

import uuid
from datetime import datetime

from sqlalchemy import Index, text
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import NOW, Base


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


ZERO = text("0")


class DeviceTime(Base):
    """What the time of one worker's process was spent on, within an hour and under the same terms.

    models/devicetime.py says what each column of seconds is.
    """

    __tablename__ = "device_time"

    worker: Mapped[str] = mapped_column(primary_key=True)
    instance: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    since: Mapped[datetime] = mapped_column(primary_key=True)
    until: Mapped[datetime] = mapped_column(server_default=NOW)
    pool: Mapped[str]
    # policy.workers.WorkerTerms
    capacity_class: Mapped[str]
    market: Mapped[str | None]
    gpu_class: Mapped[str | None]
    gpu_hour_price: Mapped[float | None]
    billed_s: Mapped[float] = mapped_column(server_default=ZERO)
    startup_s: Mapped[float] = mapped_column(server_default=ZERO)
    idle_s: Mapped[float] = mapped_column(server_default=ZERO)
    turns_s: Mapped[float] = mapped_column(server_default=ZERO)
    loads_s: Mapped[float] = mapped_column(server_default=ZERO)
    encode_s: Mapped[float] = mapped_column(server_default=ZERO)
    denoise_s: Mapped[float] = mapped_column(server_default=ZERO)
    decode_s: Mapped[float] = mapped_column(server_default=ZERO)
    padding_s: Mapped[float] = mapped_column(server_default=ZERO)

    __table_args__ = (Index("device_time_since", "since"),)
