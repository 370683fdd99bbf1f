"""Define the tables of jobs, their images, the attempts at them, and stored artifacts."""

import uuid
from datetime import date, datetime
from decimal import Decimal
from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    ForeignKey,
    Index,
    Numeric,
    UniqueConstraint,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.orm import Mapped, mapped_column, relationship

from models.ids import new_id
from models.tables.base import NOW, Base, Megapixels, listed
from models.tables.tenants import Tenant
from policy.states import FINAL_STATES, ImageState, JobState

_IN_ORDER = ("release_tag", "id")  # fair order
_LINE = ("pool", "tier", *_IN_ORDER)
_LINE_OF_TENANT = ("pool", "tier", "tenant_id", *_IN_ORDER)
_IS_WAITING = "state = 'queued' AND announced_at IS NULL AND NOT lacks_inputs"
_LACKS_INPUTS = "state = 'queued' AND lacks_inputs"


class Job(Base):
    """A request of a tenant, complete enough to be replayed, with one final state."""

    __tablename__ = "jobs"
    has_just_ended = False  # by this object, no column: so that its end is counted once

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    api_key_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("api_keys.id"))
    state: Mapped[str] = mapped_column(
        server_default=JobState.QUEUED.value, default=JobState.QUEUED.value
    )

    pool: Mapped[str]
    tier: Mapped[str]
    model: Mapped[str]
    model_alias: Mapped[str | None]  # what the request called the model, where that is not its id
    model_version: Mapped[str]
    prompt: Mapped[str]
    negative_prompt: Mapped[str]
    width_px: Mapped[int]
    height_px: Mapped[int]
    num_steps: Mapped[int]
    guidance: Mapped[float]
    sampler: Mapped[str]
    seed: Mapped[int] = mapped_column(BigInteger)
    num_images: Mapped[int]
    output_format: Mapped[str]
    init_file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"))
    mask_file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"))
    control_file_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("files.id"))
    strength: Mapped[float | None]
    clip_skip: Mapped[int | None]  # layers of the CLIP text encoder left out at its end
    adapters: Mapped[list[dict[str, Any]] | None]  # [{"name": …, "strength": …}]
    precision: Mapped[str]
    fleet_revision: Mapped[int | None]  # under which it was accepted; None: a file's
    determinism: Mapped[str]
    bucket_rows: Mapped[int | None]

    release_tag: Mapped[float] = mapped_column(
        server_default=text("extract(epoch from clock_timestamp())::double precision")
    )
    # Device seconds, as expected at accept.
    predicted_s: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    # Seconds until its end, as estimated at accept, before the learnt correction.
    eta_raw_s: Mapped[float | None]
    # Within which nine of ten such jobs end, as told at accept.
    eta_p90_s: Mapped[float | None]
    accepted_at: Mapped[datetime] = mapped_column(server_default=NOW)
    # When it came to its pool from another one; None: it was accepted there.
    pool_since: Mapped[datetime | None]
    announced_at: Mapped[datetime | None]
    # Announced ahead of its tier's queue.
    is_front: Mapped[bool] = mapped_column(server_default=text("false"), default=False)
    # The pictures it starts from are to be brought.
    lacks_inputs: Mapped[bool] = mapped_column(server_default=text("false"), default=False)
    inputs_asked_at: Mapped[datetime | None]  # of whoever brings them, the last time
    start_by: Mapped[datetime]
    # From its first start to its last pixels; anew when these are lost before they are stored.
    run_within_s: Mapped[float | None]
    run_by: Mapped[datetime | None]
    started_at: Mapped[datetime | None]
    first_preview_at: Mapped[datetime | None]  # None: nobody watched
    rendered_at: Mapped[datetime | None]
    store_by: Mapped[datetime | None]
    finished_at: Mapped[datetime | None]

    attempt: Mapped[int] = mapped_column(server_default=text("0"), default=0)  # the fence
    # Lease losses and errors.
    counted_attempts: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    worker: Mapped[str | None]
    lease_expires_at: Mapped[datetime | None]

    failure_code: Mapped[str | None]
    failure_detail: Mapped[str | None]
    # Parts of its texts that had no effect.
    warnings: Mapped[list[dict[str, Any]] | None] = mapped_column(JSONB(none_as_null=True))
    # Tokens of the prompt, and those that the model did not read; None: not known yet, or never.
    prompt_tokens: Mapped[int | None]
    truncated_tokens: Mapped[int | None]
    # Of the request that made it: its X-Request-Id, and the W3C trace context that it came with.
    request_id: Mapped[str | None]
    traceparent: Mapped[str | None]
    # The failed job that this one repeats.
    requeue_of: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id"))
    # The job whose parameters these are.
    replay_of: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("jobs.id"))
    # The tenant's own; `metadata` is SQLAlchemy's word.
    tenant_metadata: Mapped[dict[str, Any] | None] = mapped_column(
        "metadata", JSONB(none_as_null=True)
    )
    # Prompt, metadata and images are gone; what the audit log says stays.
    erased_at: Mapped[datetime | None]
    # What quotas count.
    megapixel_steps: Mapped[Decimal] = mapped_column(
        Megapixels, server_default=text("0"), default=Decimal(0)
    )
    # Denoise steps that each makes, and quotas count; None: all of `num_steps`.
    steps_per_image: Mapped[int | None]
    usage_day: Mapped[date | None]  # the day of the ledger they are booked on
    # Of its stored images.
    device_seconds: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    cost: Mapped[Decimal | None]
    currency: Mapped[str]

    images: Mapped[list["Image"]] = relationship(
        order_by="Image.index", lazy="raise", back_populates="job"
    )
    attempts: Mapped[list["Attempt"]] = relationship(order_by="Attempt.attempt", lazy="raise")
    tenant: Mapped[Tenant] = relationship(lazy="raise")

    __table_args__ = (
        CheckConstraint(f"state IN {listed(JobState)}", name="jobs_state_is_known"),
        CheckConstraint(
            "(state = 'running') = (lease_expires_at IS NOT NULL)", name="jobs_lease_while_running"
        ),
        CheckConstraint(
            "(state = 'storing') = (store_by IS NOT NULL)", name="jobs_store_by_while_storing"
        ),
        CheckConstraint(
            f"(state IN {listed(FINAL_STATES)}) = (finished_at IS NOT NULL)",
            name="jobs_finished_once_final",
        ),
        CheckConstraint(
            "(failure_code IS NULL) = (state NOT IN ('failed', 'rejected'))",
            name="jobs_failure_has_code",
        ),
        CheckConstraint(
            "(determinism = 'reproducible') = (bucket_rows IS NOT NULL)",
            name="jobs_bucket_when_reproducible",
        ),
        CheckConstraint(
            "num_images >= 1 AND num_steps >= 1 AND seed >= 0", name="jobs_counts_are_positive"
        ),
        CheckConstraint("width_px >= 1 AND height_px >= 1", name="jobs_sides_are_positive"),
        Index("jobs_ready", *_LINE, postgresql_where=text(_IS_WAITING)),
        Index(
            "jobs_announced",
            "pool",
            "tier",
            "announced_at",
            postgresql_where=text("state = 'queued' AND announced_at IS NOT NULL"),
        ),
        # Not by lease_expires_at: so a renewal touches no index, and running jobs are few.
        Index("jobs_running", "pool", "tier", postgresql_where=text("state = 'running'")),
        Index("jobs_storing", "store_by", postgresql_where=text("state = 'storing'")),
        Index(
            "jobs_start_by", "start_by", postgresql_where=text("state = 'queued' AND attempt = 0")
        ),
        Index(
            "jobs_run_by",
            "run_by",
            postgresql_where=text("state = 'queued' AND run_by IS NOT NULL"),
        ),
        Index("jobs_ready_by_tenant", *_LINE_OF_TENANT, postgresql_where=text(_IS_WAITING)),
        Index("jobs_lacking_inputs", *_LINE, postgresql_where=text(_LACKS_INPUTS)),
        Index(
            "jobs_lacking_inputs_by_tenant",
            *_LINE_OF_TENANT,
            postgresql_where=text(_LACKS_INPUTS),
        ),
        Index(
            "jobs_inputs_asked",
            "pool",
            "tier",
            postgresql_where=text("state = 'queued' AND inputs_asked_at IS NOT NULL"),
        ),
        Index(
            "jobs_oldest", "pool", "tier", "accepted_at", postgresql_where=text("state = 'queued'")
        ),
        Index("jobs_succeeded", "finished_at", postgresql_where=text("state = 'succeeded'")),
        Index("jobs_expired", "finished_at", postgresql_where=text("state = 'expired'")),
        Index("jobs_dead", "finished_at", postgresql_where=text("state = 'failed'")),
        Index(
            "jobs_requeued",
            "requeue_of",
            unique=True,
            postgresql_where=text("requeue_of IS NOT NULL"),
        ),
        CheckConstraint(
            "mask_file_id IS NULL OR init_file_id IS NOT NULL", name="jobs_mask_needs_init"
        ),
        CheckConstraint(
            "strength IS NULL OR init_file_id IS NOT NULL", name="jobs_strength_needs_init"
        ),
        Index("jobs_by_tenant", "tenant_id", "id"),
        Index("jobs_by_tenant_state", "tenant_id", "state", "id"),
        # To find the jobs that name a job or a file, where that is removed.
        Index("jobs_replayed", "replay_of", postgresql_where=text("replay_of IS NOT NULL")),
        Index(
            "jobs_by_init_file", "init_file_id", postgresql_where=text("init_file_id IS NOT NULL")
        ),
        Index(
            "jobs_by_mask_file", "mask_file_id", postgresql_where=text("mask_file_id IS NOT NULL")
        ),
        Index(
            "jobs_by_control_file",
            "control_file_id",
            postgresql_where=text("control_file_id IS NOT NULL"),
        ),
    )


class JobLabel(Base):
    """A job in the list of those that share one entry of metadata; triggers on `jobs` keep it.

    label: a digest of the entry.
    """

    __tablename__ = "job_labels"

    tenant_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    label: Mapped[uuid.UUID] = mapped_column(primary_key=True)
    job_id: Mapped[uuid.UUID] = mapped_column(primary_key=True)


class Image(Base):
    """One image of a job: rendered once, stored once, whatever happens to the attempts."""

    __tablename__ = "images"

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    index: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    seed: Mapped[int] = mapped_column(BigInteger)
    state: Mapped[str] = mapped_column(
        server_default=ImageState.PENDING.value, default=ImageState.PENDING.value
    )
    handed_off_attempt: Mapped[int | None]
    handed_off_at: Mapped[datetime | None]
    snapshot_ref: Mapped[str | None]
    # Steps that something is left of: pixels or a snapshot.
    steps_done: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    # The last step that was noted, whether anything is left of it or not.
    reached_step: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    # How often its pixels were lost before they were stored.
    hand_offs_lost: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    device_seconds: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    # Of these, its share of rows that padded its forwards.
    padding_s: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    # What these cost, by the terms of the workers that spent them; None: as its pool says.
    device_cost: Mapped[Decimal | None] = mapped_column(Numeric(24, 12))
    # Why it probably shows nothing: tasks.suspicion.Suspicion; None: it looks like a picture.
    suspect: Mapped[str | None]
    artifact_id: Mapped[uuid.UUID | None] = mapped_column(ForeignKey("artifacts.id"))

    job: Mapped[Job] = relationship(lazy="raise", back_populates="images")
    artifact: Mapped["Artifact | None"] = relationship(lazy="raise", foreign_keys=[artifact_id])

    __table_args__ = (
        CheckConstraint(f"state IN {listed(ImageState)}", name="images_state_is_known"),
        CheckConstraint(
            "(state = 'stored') = (artifact_id IS NOT NULL)", name="images_stored_have_artifact"
        ),
        CheckConstraint(
            "(state = 'pending') = (handed_off_attempt IS NULL)",
            name="images_handed_off_by_attempt",
        ),
        Index(
            "images_by_artifact", "artifact_id", postgresql_where=text("artifact_id IS NOT NULL")
        ),
    )


class Attempt(Base):
    """One try at a job: its worker, its steps and those shared with other jobs, its outcome."""

    __tablename__ = "attempts"

    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id"), primary_key=True)
    attempt: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)
    worker: Mapped[str]
    device: Mapped[str]
    # Terms of the device at that time: policy.workers.WorkerTerms.
    capacity_class: Mapped[str] = mapped_column(server_default=text("''"), default="")
    market: Mapped[str | None]
    gpu_class: Mapped[str | None]
    gpu_hour_price: Mapped[float | None]
    started_at: Mapped[datetime] = mapped_column(server_default=NOW)
    ended_at: Mapped[datetime | None]
    outcome: Mapped[str]
    # Why its device time bought no image: lease_lost, canceled, error.
    waste_class: Mapped[str | None]
    error: Mapped[str | None]
    # Of its images, that a snapshot spared it.
    resumed_steps: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    # Of its images, done before and to be done again.
    lost_steps: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    lost_cause: Mapped[str | None]  # outcome of the attempt that had done them
    # Left for the next attempt.
    snapshot_bytes: Mapped[int] = mapped_column(BigInteger, server_default=text("0"), default=0)
    snapshot_store: Mapped[str | None]  # where they lie
    # Denoise steps of its images, added up.
    steps: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    # Of those, with another job's image in the forward.
    shared_steps: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    # Of the denoiser's largest forward, padding not counted.
    max_rows: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    max_images: Mapped[int] = mapped_column(server_default=text("0"), default=0)
    mean_rows: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    bucket_rows: Mapped[int | None]
    device_seconds: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    # Of images that it had in hand when it was last heard of; 0 once their time is on record.
    unfinished_s: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    # From its engine's taking an image until its first step; of several images the longest.
    waited_s: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    encode_s: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    denoise_s: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    decode_s: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    padding_s: Mapped[float] = mapped_column(server_default=text("0"), default=0.0)
    fingerprint: Mapped[str | None]
    fingerprint_facts: Mapped[dict[str, Any] | None]


class Artifact(Base):
    """A stored, content-addressed image.

    Two digests: of the pixels as decoded, and of the bytes as stored.
    """

    __tablename__ = "artifacts"

    id: Mapped[uuid.UUID] = mapped_column(primary_key=True, default=new_id)
    tenant_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("tenants.id"))
    job_id: Mapped[uuid.UUID] = mapped_column(ForeignKey("jobs.id"))
    index: Mapped[int]
    object_key: Mapped[str]
    content_type: Mapped[str]
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    width_px: Mapped[int]
    height_px: Mapped[int]
    pixels_sha256: Mapped[str]
    content_sha256: Mapped[str]
    created_at: Mapped[datetime] = mapped_column(server_default=NOW)
    erased_at: Mapped[datetime | None]  # the object is gone, or on its way out; the digests stay

    __table_args__ = (
        UniqueConstraint("job_id", "index", name="artifacts_one_per_image"),
        Index("artifacts_by_tenant_day", "tenant_id", "created_at"),
        Index("artifacts_by_key", "object_key"),
    )
