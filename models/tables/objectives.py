"""Define the tables of tiers' objectives, and of how far they are met."""

from datetime import datetime

from sqlalchemy import BigInteger
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import Base


class ObjectiveTarget(Base):
    """The part of its jobs that a tier aims to serve so, as the newest fleet says."""

    __tablename__ = "slo_targets"

    tier: Mapped[str] = mapped_column(primary_key=True)
    objective: Mapped[str] = mapped_column(primary_key=True)
    target: Mapped[float]


class ObjectiveCount(Base):
    """The jobs of a tier that ended within five minutes, and those that met the objective."""

    __tablename__ = "slo_counts"

    tier: Mapped[str] = mapped_column(primary_key=True)
    objective: Mapped[str] = mapped_column(primary_key=True)
    bucket: Mapped[datetime] = mapped_column(primary_key=True)  # its start
    good: Mapped[int] = mapped_column(BigInteger)
    total: Mapped[int] = mapped_column(BigInteger)
