"""Define the tables of fair order, and of what was learnt of jobs."""

import uuid
from datetime import datetime

from sqlalchemy import ForeignKey, text
from sqlalchemy.orm import Mapped, mapped_column

from models.tables.base import Base


class Flow(Base):
    """A tenant's stream of jobs in one (pool, tier), with its tag in fair order and its backlog.

    A trigger on `jobs` keeps the three sums, so that a backlog is never counted.
    """

    __tablename__ = "flows"

    pool: Mapped[str] = mapped_column(primary_key=True)
    tier: Mapped[str] = mapped_column(primary_key=True)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"), primary_key=True)
    # The finish tag of its newest job, in virtual seconds.
    finish_tag: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    # Jobs that are announced or not.
    queued_jobs: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    queued_images: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    # Device seconds, predicted.
    queued_s: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)


class FairClock(Base):
    """Virtual time of one (pool, tier): the start tag of the job released last in fair order."""

    __tablename__ = "fair_clocks"

    pool: Mapped[str] = mapped_column(primary_key=True)
    tier: Mapped[str] = mapped_column(primary_key=True)
    virtual_s: Mapped[float]


class LearntCost(Base):
    """The device seconds of one model and size, learnt from images that were rendered."""

    __tablename__ = "learnt_costs"

    # With its capacity class, for devices differ: "sdxl.spot".
    pool: Mapped[str] = mapped_column(primary_key=True)
    model: Mapped[str] = mapped_column(primary_key=True)
    width_px: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    height_px: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    row_step_s: Mapped[float]  # device seconds of one row in one denoise step
    fixed_s: Mapped[float]  # device seconds of encode and decode
    observed: Mapped[int]  # images


class LearntEta(Base):
    """The error of first estimates of a job's end in one (pool, tier).

    As quantiles of actual / guessed.
    """

    __tablename__ = "learnt_etas"

    pool: Mapped[str] = mapped_column(primary_key=True)
    tier: Mapped[str] = mapped_column(primary_key=True)
    ratio_p50: Mapped[float]
    ratio_p90: Mapped[float]
    observed: Mapped[int]  # jobs
    learnt_until: Mapped[datetime]  # `finished_at` of the newest of them
