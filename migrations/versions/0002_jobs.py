"""Tenants and their keys, jobs and what became of them, and the workers that are alive."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "tenants",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("name"),
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("slots", sa.Integer(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("seen_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("facts", postgresql.JSONB(), nullable=False),
        sa.PrimaryKeyConstraint("name"),
    )
    op.create_index("workers_by_pool", "workers", ["pool", "seen_at"], unique=False)
    op.create_table(
        "api_keys",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("kid", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("revoked_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("kid"),
    )
    op.create_index("api_keys_by_tenant", "api_keys", ["tenant_id"], unique=False)
    op.create_table(
        "jobs",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("api_key_id", sa.Uuid(), nullable=True),
        sa.Column("state", sa.Text(), server_default="queued", nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("tier", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("model_version", sa.Text(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("negative_prompt", sa.Text(), nullable=False),
        sa.Column("width_px", sa.Integer(), nullable=False),
        sa.Column("height_px", sa.Integer(), nullable=False),
        sa.Column("num_steps", sa.Integer(), nullable=False),
        sa.Column("guidance", sa.Double(), nullable=False),
        sa.Column("sampler", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("num_images", sa.Integer(), nullable=False),
        sa.Column("output_format", sa.Text(), nullable=False),
        sa.Column("precision", sa.Text(), nullable=False),
        sa.Column("determinism", sa.Text(), nullable=False),
        sa.Column("bucket_rows", sa.Integer(), nullable=True),
        sa.Column(
            "release_tag", sa.Double(), server_default=sa.text("extract(epoch from clock_timestamp())::double precision"), nullable=False
        ),
        sa.Column("accepted_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("announced_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("start_by", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("rendered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("store_by", sa.DateTime(timezone=True), nullable=True),
        sa.Column("finished_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("attempt", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("counted_attempts", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("worker", sa.Text(), nullable=True),
        sa.Column("lease_expires_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("failure_code", sa.Text(), nullable=True),
        sa.Column("failure_detail", sa.Text(), nullable=True),
        sa.Column("device_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("cost", sa.Numeric(precision=14, scale=6), nullable=True),
        sa.Column("currency", sa.Text(), nullable=False),
        sa.CheckConstraint("(determinism = 'reproducible') = (bucket_rows IS NOT NULL)", name="jobs_bucket_when_reproducible"),
        sa.CheckConstraint("(failure_code IS NULL) = (state NOT IN ('failed', 'rejected'))", name="jobs_failure_has_code"),
        sa.CheckConstraint("(state = 'running') = (lease_expires_at IS NOT NULL)", name="jobs_lease_while_running"),
        sa.CheckConstraint("(state = 'storing') = (store_by IS NOT NULL)", name="jobs_store_by_while_storing"),
        sa.CheckConstraint(
            "(state IN ('succeeded', 'failed', 'rejected', 'canceled', 'expired')) = (finished_at IS NOT NULL)",
            name="jobs_finished_once_final",
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'storing', 'succeeded', 'failed', 'rejected', 'canceled', 'expired')",
            name="jobs_state_is_known",
        ),
        sa.CheckConstraint("num_images >= 1 AND num_steps >= 1 AND seed >= 0", name="jobs_counts_are_positive"),
        sa.CheckConstraint("width_px >= 1 AND height_px >= 1", name="jobs_sides_are_positive"),
        sa.ForeignKeyConstraint(
            ["api_key_id"],
            ["api_keys.id"],
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index(
        "jobs_announced",
        "jobs",
        ["pool", "tier", "announced_at"],
        unique=False,
        postgresql_where=sa.text("state = 'queued' AND announced_at IS NOT NULL"),
    )
    op.create_index("jobs_by_tenant", "jobs", ["tenant_id", "id"], unique=False)
    op.create_index(
        "jobs_running", "jobs", ["pool", "tier", "lease_expires_at"], unique=False, postgresql_where=sa.text("state = 'running'")
    )
    op.create_index("jobs_start_by", "jobs", ["start_by"], unique=False, postgresql_where=sa.text("state = 'queued' AND attempt = 0"))
    op.create_index("jobs_storing", "jobs", ["store_by"], unique=False, postgresql_where=sa.text("state = 'storing'"))
    op.create_index(
        "jobs_waiting",
        "jobs",
        ["pool", "tier", "release_tag", "id"],
        unique=False,
        postgresql_where=sa.text("state = 'queued' AND announced_at IS NULL"),
    )
    op.create_table(
        "artifacts",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("index", sa.Integer(), nullable=False),
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("content_type", sa.Text(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("width_px", sa.Integer(), nullable=False),
        sa.Column("height_px", sa.Integer(), nullable=False),
        sa.Column("pixels_sha256", sa.Text(), nullable=False),
        sa.Column("content_sha256", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
        ),
        sa.ForeignKeyConstraint(
            ["tenant_id"],
            ["tenants.id"],
        ),
        sa.PrimaryKeyConstraint("id"),
        sa.UniqueConstraint("job_id", "index", name="artifacts_one_per_image"),
    )
    op.create_index("artifacts_by_key", "artifacts", ["object_key"], unique=False)
    op.create_index("artifacts_by_tenant_day", "artifacts", ["tenant_id", "created_at"], unique=False)
    op.create_table(
        "attempts",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("attempt", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("device", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.Column("waste_class", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("steps", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("shared_steps", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("max_rows", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("max_images", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("mean_rows", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("bucket_rows", sa.Integer(), nullable=True),
        sa.Column("device_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("encode_s", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("denoise_s", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("decode_s", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=True),
        sa.Column("fingerprint_facts", postgresql.JSONB(), nullable=True),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
        ),
        sa.PrimaryKeyConstraint("job_id", "attempt"),
    )
    op.create_table(
        "images",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("index", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=False),
        sa.Column("state", sa.Text(), server_default="pending", nullable=False),
        sa.Column("handed_off_attempt", sa.Integer(), nullable=True),
        sa.Column("handed_off_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("snapshot_ref", sa.Text(), nullable=True),
        sa.Column("steps_done", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("device_seconds", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("artifact_id", sa.Uuid(), nullable=True),
        sa.CheckConstraint("(state = 'pending') = (handed_off_attempt IS NULL)", name="images_handed_off_by_attempt"),
        sa.CheckConstraint("(state = 'stored') = (artifact_id IS NOT NULL)", name="images_stored_have_artifact"),
        sa.CheckConstraint("state IN ('pending', 'handed_off', 'stored')", name="images_state_is_known"),
        sa.ForeignKeyConstraint(
            ["artifact_id"],
            ["artifacts.id"],
        ),
        sa.ForeignKeyConstraint(
            ["job_id"],
            ["jobs.id"],
        ),
        sa.PrimaryKeyConstraint("job_id", "index"),
    )


def downgrade() -> None:
    op.drop_table("images")
    op.drop_table("attempts")
    op.drop_table("artifacts")
    op.drop_table("jobs")
    op.drop_table("api_keys")
    op.drop_table("workers")
    op.drop_table("tenants")
