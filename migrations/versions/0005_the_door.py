"""What the door needs: limits and a ledger per tenant, scopes of keys, pictures that tenants bring, idempotency keys, webhooks.

Works beside the code of 0004: new columns have defaults or may be empty, and keys that exist may do what they could do before.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import ARRAY, JSONB

from migrations import online

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

MEGAPIXELS = sa.Numeric(18, 6)
INSTANT = sa.DateTime(timezone=True)
NOW = sa.text("clock_timestamp()")

NEW_COLUMNS: dict[str, list[tuple[str, sa.types.TypeEngine, str | None]]] = {  # name, type, default; without one it may be empty
    "tenants": [
        ("requests_per_minute", sa.Integer(), None),
        ("megapixel_steps_per_minute", sa.Double(), None),
        ("burst_megapixel_steps", sa.Double(), None),
        ("max_concurrent_jobs", sa.Integer(), None),
        ("daily_megapixel_steps", MEGAPIXELS, None),
        ("monthly_megapixel_steps", MEGAPIXELS, None),
        ("allowed_tiers", ARRAY(sa.Text()), None),
        ("allowed_models", ARRAY(sa.Text()), None),
        ("url_inputs", sa.Boolean(), "false"),
    ],
    "api_keys": [("scopes", ARRAY(sa.Text()), "'{generate,read}'"), ("last_used_at", INSTANT, None)],
    "jobs": [
        ("init_file_id", sa.Uuid(), None),
        ("mask_file_id", sa.Uuid(), None),
        ("control_file_id", sa.Uuid(), None),
        ("strength", sa.Double(), None),
        ("adapters", JSONB(), None),
        ("replay_of", sa.Uuid(), None),
        ("metadata", JSONB(), None),
        ("erased_at", INSTANT, None),
        ("megapixel_steps", MEGAPIXELS, "0"),
        ("usage_day", sa.Date(), None),
    ],
    "artifacts": [("erased_at", INSTANT, None)],
}
CHECKS = [
    (
        "tenants",
        "tenants_budget_has_rate_and_burst",
        "(megapixel_steps_per_minute IS NULL) = (burst_megapixel_steps IS NULL)",
    ),
    (
        "tenants",
        "tenants_limits_are_positive",
        "least(requests_per_minute, megapixel_steps_per_minute, burst_megapixel_steps, max_concurrent_jobs) > 0",
    ),
    ("tenants", "tenants_quotas_are_not_negative", "least(daily_megapixel_steps, monthly_megapixel_steps) >= 0"),
    ("api_keys", "api_keys_scopes_are_known", "scopes <@ ARRAY['generate', 'read', 'admin'] AND scopes <> '{}'"),
    ("jobs", "jobs_mask_needs_init", "mask_file_id IS NULL OR init_file_id IS NOT NULL"),
    ("jobs", "jobs_strength_with_init", "(init_file_id IS NULL) = (strength IS NULL)"),
]
NEW_TABLES = (
    "usage_ledger",
    "idempotency_keys",
    "files",
    "webhook_endpoints",
    "webhook_secrets",
    "webhook_deliveries",
    "webhook_attempts",
)

# What models/accepting.py does, as a function: planned once a connection, where planning takes longer than running.
# `asked` reads the jobs; `placed` adds up their cost in virtual seconds within each flow, so that each starts where the one before it ends
# (models/flows.py). The ledger reads `flow` and the jobs read both: that is the order of the locks. Whatever nobody reads runs last.
ACCEPT_JOBS = """
CREATE FUNCTION accept_jobs(_jobs jsonb, _tenant_id uuid, _api_key_id uuid, _currency text, _actor text)
RETURNS TABLE (id uuid, accepted_at timestamptz, start_by timestamptz, release_tag double precision, usage_day date)
LANGUAGE plpgsql AS $$
#variable_conflict use_column
BEGIN RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(_jobs) AS asked (
            place integer, id uuid, event_id uuid, facts jsonb, start_within_s double precision, announced boolean,
            pool text, tier text, model text, model_version text, prompt text, negative_prompt text, width_px integer,
            height_px integer, num_steps integer, guidance double precision, sampler text, seed bigint, num_images
            integer, output_format text, init_file_id uuid, mask_file_id uuid, control_file_id uuid, strength double
            precision, adapters jsonb, precision text, determinism text, bucket_rows integer, run_within_s double
            precision, predicted_s double precision, eta_raw_s double precision, megapixel_steps numeric(18, 6), metadata
            jsonb, requeue_of uuid, replay_of uuid)
    ), placed AS MATERIALIZED (
        SELECT asked.*, predicted_s / weight AS own_s, sum(predicted_s / weight) OVER (PARTITION BY pool, tier ORDER BY place) AS upto_s
        FROM asked, (SELECT weight FROM tenants WHERE id = _tenant_id) tenant
    ), whole AS MATERIALIZED (
        SELECT pool, tier, max(upto_s) AS cost_s, coalesce(
                   (SELECT virtual_s FROM fair_clocks c WHERE c.pool = placed.pool AND c.tier = placed.tier),
                   extract(epoch FROM clock_timestamp())::double precision) AS clock_s
        FROM placed GROUP BY pool, tier
    ), flow AS (
        INSERT INTO flows AS f (pool, tier, tenant_id, finish_tag)
            SELECT pool, tier, _tenant_id, clock_s + cost_s FROM whole ORDER BY pool, tier
        ON CONFLICT (pool, tier, tenant_id) DO UPDATE SET
            finish_tag = greatest(
                excluded.finish_tag, f.finish_tag + (SELECT cost_s FROM whole w WHERE (w.pool, w.tier) = (f.pool, f.tier)))
        RETURNING f.pool, f.tier, f.finish_tag - (SELECT cost_s FROM whole w WHERE (w.pool, w.tier) = (f.pool, f.tier)) AS start_tag
    ), ledger AS (
        INSERT INTO usage_ledger AS u (tenant_id, day, reserved, jobs_accepted)
            SELECT _tenant_id, (clock_timestamp() AT TIME ZONE 'UTC')::date, sum(megapixel_steps), count(*)
            FROM placed JOIN flow USING (pool, tier)
        ON CONFLICT (tenant_id, day) DO UPDATE SET
            reserved = u.reserved + excluded.reserved, jobs_accepted = u.jobs_accepted + excluded.jobs_accepted
        RETURNING day
    ), job AS (
        INSERT INTO jobs (id, tenant_id, api_key_id, currency, start_by, release_tag, usage_day, announced_at,
                          pool, tier, model, model_version, prompt, negative_prompt, width_px, height_px, num_steps, guidance, sampler,
                          seed, num_images, output_format, init_file_id, mask_file_id, control_file_id, strength, adapters, precision,
                          determinism, bucket_rows, run_within_s, predicted_s, eta_raw_s, megapixel_steps, metadata, requeue_of,
                          replay_of)
            SELECT id, _tenant_id, _api_key_id, _currency, clock_timestamp() + make_interval(secs => start_within_s),
                   start_tag + upto_s - own_s, day, CASE WHEN announced THEN clock_timestamp() END,
                   pool, tier, model, model_version, prompt, negative_prompt, width_px, height_px, num_steps, guidance, sampler,
                   seed, num_images, output_format, init_file_id, mask_file_id, control_file_id, strength, adapters, precision,
                   determinism, bucket_rows, run_within_s, predicted_s, eta_raw_s, megapixel_steps, metadata, requeue_of,
                   replay_of
            FROM placed JOIN flow USING (pool, tier) CROSS JOIN ledger ORDER BY place
        RETURNING id, accepted_at, start_by, release_tag, usage_day, seed, num_images, pool, tier, announced_at
    ), image AS (
        INSERT INTO images (job_id, index, seed) SELECT id, index, seed + index FROM job, generate_series(0, num_images - 1) index
    ), clock AS (
        INSERT INTO fair_clocks AS c (pool, tier, virtual_s)
            SELECT pool, tier, max(release_tag) FROM job WHERE announced_at IS NOT NULL GROUP BY pool, tier
        ON CONFLICT (pool, tier) DO UPDATE SET virtual_s = greatest(c.virtual_s, excluded.virtual_s)
    ), event AS (
        INSERT INTO audit_events (id, chain_id, seq, event, actor, job_id, facts, prev_hash, hash)
            SELECT event_id, _tenant_id::text, 0, 'job:request:accepted', _actor, id, facts, '', ''
            FROM placed JOIN job USING (id) ORDER BY place
    )
    SELECT id, accepted_at, start_by, release_tag, usage_day FROM job;
END $$
"""

VIEWS = {
    "usage_by_tenant_day": (
        "One row per tenant and UTC day: megapixel-steps reserved by jobs under way and settled by those that succeeded, and money.",
        """
        SELECT u.day, t.name AS tenant, u.jobs_accepted, u.jobs_succeeded, u.reserved AS reserved_megapixel_steps,
               u.settled AS settled_megapixel_steps, u.cost
        FROM usage_ledger u JOIN tenants t ON t.id = u.tenant_id
        """,
    ),
    "webhooks_now": (
        "One row per webhook endpoint that is not deleted: what waits for it, since when, and how the last attempt ended.",
        """
        SELECT t.name AS tenant, e.id AS endpoint_id, e.disabled_at, e.disabled_reason, d.pending, d.oldest_pending_s,
               a.at AS last_attempt_at, a.status AS last_status, a.error AS last_error
        FROM webhook_endpoints e
        JOIN tenants t ON t.id = e.tenant_id
        LEFT JOIN LATERAL (
            SELECT count(*) AS pending, round(extract(epoch FROM clock_timestamp() - min(created_at)), 1) AS oldest_pending_s
            FROM webhook_deliveries WHERE endpoint_id = e.id AND state = 'pending'
        ) d ON true
        LEFT JOIN LATERAL (
            SELECT wa.at, wa.status, wa.error FROM webhook_attempts wa JOIN webhook_deliveries wd ON wd.id = wa.delivery_id
            WHERE wd.endpoint_id = e.id ORDER BY wd.id DESC, wa.attempt DESC LIMIT 1
        ) a ON true
        WHERE e.deleted_at IS NULL
        """,
    ),
}


def upgrade() -> None:
    for table, columns in NEW_COLUMNS.items():
        online.add_columns(table, [_column(name, kind, default) for name, kind, default in columns])
    for table, name, condition in CHECKS:
        online.add_check(table, name, condition)
    online.create_index("jobs_by_metadata", "jobs", ["metadata"], using="gin", where="metadata IS NOT NULL")
    with op.get_context().autocommit_block():  # before what names it, which is committed at once
        _add_files()
    for column in ("init_file_id", "mask_file_id", "control_file_id"):
        online.add_foreign_key("jobs", column, "files")
    online.add_foreign_key("jobs", "replay_of", "jobs")
    _add_ledger()
    _add_webhooks()
    for name, (about, query) in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS {query}")
        op.execute(f"COMMENT ON VIEW {name} IS '{about}'")
        op.execute(f"GRANT SELECT ON {name} TO darkroom_app, darkroom_auditor")
    op.execute(f"GRANT SELECT, INSERT, UPDATE ON {', '.join(NEW_TABLES)} TO darkroom_app")
    op.execute(ACCEPT_JOBS)
    op.execute("GRANT DELETE ON idempotency_keys, webhook_deliveries, webhook_attempts TO darkroom_app")


def downgrade() -> None:
    op.execute("DROP FUNCTION accept_jobs")
    for name in VIEWS:
        op.execute(f"DROP VIEW {name}")
    op.drop_index("jobs_by_metadata", "jobs")
    for table, name, _ in CHECKS:
        op.drop_constraint(name, table)
    for table, columns in NEW_COLUMNS.items():
        for name, _, _ in columns:
            op.drop_column(table, name)
    for table in reversed(NEW_TABLES):
        op.drop_table(table)


def _column(name: str, kind: sa.types.TypeEngine, default: str | None) -> sa.Column:
    return sa.Column(name, kind, server_default=None if default is None else sa.text(default), nullable=default is None)


def _id() -> sa.Column:
    return sa.Column("id", sa.Uuid(), primary_key=True)


def _reference(name: str, table: str, *, optional: bool = False, primary_key: bool = False) -> sa.Column:
    return sa.Column(name, sa.Uuid(), sa.ForeignKey(f"{table}.id"), nullable=optional, primary_key=primary_key)


def _text(name: str, *, optional: bool = False) -> sa.Column:
    return sa.Column(name, sa.Text(), nullable=optional)


def _instant(name: str) -> sa.Column:
    return sa.Column(name, INSTANT, nullable=True)


def _created() -> sa.Column:
    return sa.Column("created_at", INSTANT, server_default=NOW, nullable=False)


def _counter(name: str, kind: sa.types.TypeEngine) -> sa.Column:
    return sa.Column(name, kind, server_default=sa.text("0"), nullable=False)


def _add_ledger() -> None:
    op.create_table(
        "usage_ledger",
        _reference("tenant_id", "tenants", primary_key=True),
        sa.Column("day", sa.Date(), primary_key=True),
        _counter("reserved", MEGAPIXELS),
        _counter("settled", MEGAPIXELS),
        _counter("jobs_accepted", sa.Integer()),
        _counter("jobs_succeeded", sa.Integer()),
        _counter("cost", sa.Numeric(14, 6)),
    )
    op.create_table(
        "idempotency_keys",
        _reference("tenant_id", "tenants", primary_key=True),
        sa.Column("key", sa.Text(), primary_key=True),
        _text("request_sha256"),
        _reference("job_id", "jobs", optional=True),
        sa.Column("answer", JSONB(), nullable=True),
        _created(),
    )
    op.create_index("idempotency_keys_by_age", "idempotency_keys", ["created_at"])


def _add_files() -> None:
    op.create_table(
        "files",
        _id(),
        _reference("tenant_id", "tenants"),
        _text("object_key"),
        _text("mode"),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("width_px", sa.Integer(), nullable=False),
        sa.Column("height_px", sa.Integer(), nullable=False),
        _text("content_sha256"),
        _created(),
        _instant("erased_at"),
        if_not_exists=True,
    )
    live, again = sa.text("erased_at IS NULL"), {"if_not_exists": True}
    op.create_index("files_live", "files", ["tenant_id", "content_sha256"], unique=True, postgresql_where=live, **again)
    op.create_index("files_by_key", "files", ["object_key"], **again)
    op.create_index("files_by_tenant", "files", ["tenant_id", "id"], postgresql_where=live, **again)


def _add_webhooks() -> None:
    op.create_table(
        "webhook_endpoints",
        _id(),
        _reference("tenant_id", "tenants"),
        _text("url"),
        sa.Column("description", sa.Text(), server_default=sa.text("''"), nullable=False),
        sa.Column("events", ARRAY(sa.Text()), nullable=False),
        _created(),
        _instant("disabled_at"),
        _text("disabled_reason", optional=True),
        _instant("deleted_at"),
    )
    live = sa.text("disabled_at IS NULL AND deleted_at IS NULL")
    op.create_index("webhook_endpoints_live", "webhook_endpoints", ["tenant_id"], postgresql_where=live)
    op.create_index("webhook_endpoints_by_tenant", "webhook_endpoints", ["tenant_id"])
    op.create_table(
        "webhook_secrets",
        _id(),
        _reference("endpoint_id", "webhook_endpoints"),
        _text("secret"),
        _created(),
        _instant("expires_at"),
    )
    op.create_index("webhook_secrets_by_endpoint", "webhook_secrets", ["endpoint_id"])
    op.create_table(
        "webhook_deliveries",
        _id(),
        _reference("endpoint_id", "webhook_endpoints"),
        _reference("tenant_id", "tenants"),
        _text("event"),
        _reference("job_id", "jobs", optional=True),
        sa.Column("state", sa.Text(), server_default=sa.text("'pending'"), nullable=False),
        _created(),
        sa.Column("due_at", INSTANT, server_default=NOW, nullable=True),
        _instant("claimed_until"),
        _counter("attempts", sa.Integer()),
        _instant("ended_at"),
        sa.CheckConstraint("state IN ('pending', 'delivered', 'gone', 'failed')", name="webhook_deliveries_state_is_known"),
        sa.CheckConstraint("(state = 'pending') = (due_at IS NOT NULL)", name="webhook_deliveries_due_while_pending"),
    )
    pending = sa.text("state = 'pending'")
    op.create_index("webhook_deliveries_due", "webhook_deliveries", ["endpoint_id", "due_at"], postgresql_where=pending)
    op.create_index("webhook_deliveries_by_job", "webhook_deliveries", ["job_id"], postgresql_where=pending)
    op.create_index("webhook_deliveries_by_endpoint", "webhook_deliveries", ["endpoint_id", "id"])
    claimed = sa.text("claimed_until IS NOT NULL")
    op.create_index("webhook_deliveries_claimed", "webhook_deliveries", ["endpoint_id", "claimed_until"], postgresql_where=claimed)
    op.create_index("webhook_deliveries_by_age", "webhook_deliveries", ["created_at"])
    op.create_table(
        "webhook_attempts",
        sa.Column("delivery_id", sa.Uuid(), sa.ForeignKey("webhook_deliveries.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("attempt", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column("at", INSTANT, server_default=NOW, nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        _text("error", optional=True),
        sa.Column("took_s", sa.Double(), nullable=False),
    )
