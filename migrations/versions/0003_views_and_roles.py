"""Views for people, and two roles: the application, which may only append to the audit log, and the auditor, who sees views only."""

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

VIEWS = {
    "job_history": (
        "One row per job: what was asked, where the time went, what it cost. Newest first by accepted_at.",
        """
        SELECT j.id AS job_id, t.name AS tenant, j.state, j.tier, j.pool, j.model, j.model_version, j.prompt, j.negative_prompt,
               j.width_px || 'x' || j.height_px AS size, j.num_steps, j.guidance, j.sampler, j.seed, j.num_images, j.output_format,
               j.precision, j.determinism, j.bucket_rows, j.accepted_at, j.started_at, j.rendered_at, j.finished_at,
               round(extract(epoch FROM j.started_at - j.accepted_at), 3) AS queue_s,
               round(extract(epoch FROM j.rendered_at - j.started_at), 3) AS render_s,
               round(extract(epoch FROM j.finished_at - j.rendered_at), 3) AS store_s,
               round(extract(epoch FROM j.finished_at - j.accepted_at), 3) AS total_s,
               j.attempt AS attempts, j.worker, a.device, coalesce(a.max_images, 0) AS max_batch_images,
               coalesce(a.max_rows, 0) AS max_batch_rows, coalesce(a.steps, 0) AS steps_run, coalesce(a.shared_steps, 0) AS steps_shared,
               round(j.device_seconds::numeric, 4) AS gpu_seconds, j.cost, j.currency, j.failure_code, j.failure_detail
        FROM jobs j
        JOIN tenants t ON t.id = j.tenant_id
        LEFT JOIN LATERAL (
            SELECT max(device) AS device, max(max_images) AS max_images, max(max_rows) AS max_rows, sum(steps) AS steps,
                   sum(shared_steps) AS shared_steps
            FROM attempts WHERE attempts.job_id = j.id
        ) a ON true
        """,
    ),
    "queue_now": (
        "One row per pool and tier with unfinished jobs: how many wait, run and are being stored, and how long the oldest has waited.",
        """
        SELECT j.pool, j.tier,
               count(*) FILTER (WHERE j.state = 'queued' AND j.announced_at IS NULL) AS waiting,
               count(*) FILTER (WHERE j.state = 'queued' AND j.announced_at IS NOT NULL) AS announced,
               count(*) FILTER (WHERE j.state = 'running') AS running,
               count(*) FILTER (WHERE j.state = 'storing') AS storing,
               sum(j.num_images) AS images,
               round(extract(epoch FROM clock_timestamp() - min(j.accepted_at) FILTER (WHERE j.state = 'queued')), 1) AS oldest_wait_s,
               (SELECT count(*) FROM workers w
                WHERE w.pool = j.pool AND w.seen_at > clock_timestamp() - interval '15 seconds') AS live_workers
        FROM jobs j WHERE j.state IN ('queued', 'running', 'storing') GROUP BY j.pool, j.tier
        """,
    ),
    "audit_log": (
        "One row per audit event, readable: who did what to which job, with its place in the hash chain.",
        """
        SELECT e.at, coalesce(t.name, e.chain_id) AS chain, e.seq, e.event, e.actor, e.job_id, e.attempt,
               (SELECT string_agg(f.key || '=' || (f.value #>> '{}'), ' ' ORDER BY f.key) FROM jsonb_each(e.facts) f
                WHERE length(f.value #>> '{}') <= 64) AS facts_text,
               e.facts, e.id AS event_id, encode(e.prev_hash, 'hex') AS prev_hash, encode(e.hash, 'hex') AS hash
        FROM audit_events e LEFT JOIN tenants t ON t.id::text = e.chain_id
        """,
    ),
    "images_by_tenant_day": (
        "Stored images per tenant, UTC day, tier and model, with bytes, GPU-seconds and cost.",
        """
        SELECT t.name AS tenant, (a.created_at AT TIME ZONE 'UTC')::date AS day, j.tier, j.model, count(*) AS images,
               sum(a.size_bytes) AS size_bytes, round(sum(i.device_seconds)::numeric, 3) AS gpu_seconds,
               round(sum(j.cost * (i.device_seconds / nullif(j.device_seconds, 0))::numeric), 6) AS cost, j.currency
        FROM artifacts a
        JOIN images i ON i.artifact_id = a.id
        JOIN jobs j ON j.id = a.job_id
        JOIN tenants t ON t.id = a.tenant_id
        GROUP BY t.name, day, j.tier, j.model, j.currency
        """,
    ),
    "audit_chain_status": (
        "One row per audit chain: how many events it has and its head. Check it with: SELECT * FROM audit_verify().",
        """
        SELECT coalesce(t.name, c.chain_id) AS chain, c.chain_id, c.last_seq AS events, encode(c.last_hash, 'hex') AS head
        FROM audit_chains c LEFT JOIN tenants t ON t.id::text = c.chain_id
        """,
    ),
}

# NOLOGIN here: who logs in with which password is the deployment's business (python -m migrations).
ROLE = """
DO $$ BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = '{0}') THEN CREATE ROLE {0} NOLOGIN; END IF;
EXCEPTION WHEN duplicate_object OR unique_violation THEN NULL;
END $$
"""

APP_TABLES = "tenants, api_keys, jobs, images, attempts, artifacts, workers"


def upgrade() -> None:
    for name, (comment, query) in VIEWS.items():
        op.execute(f"CREATE VIEW {name} AS {query}")
        op.execute(f"COMMENT ON VIEW {name} IS '{comment}'")
    for role in ("darkroom_app", "darkroom_auditor"):
        op.execute(ROLE.format(role))
        op.execute(f"GRANT USAGE ON SCHEMA public TO {role}")
        op.execute(f"GRANT SELECT ON {', '.join(VIEWS)} TO {role}")
        op.execute(f"GRANT EXECUTE ON FUNCTION audit_verify(text) TO {role}")
    op.execute(f"GRANT SELECT, INSERT, UPDATE ON {APP_TABLES} TO darkroom_app")
    op.execute("GRANT DELETE ON workers TO darkroom_app")
    op.execute("GRANT INSERT ON audit_events TO darkroom_app")
    for function in ("audit_verify(text)", "audit_ensure_partitions(integer)"):
        op.execute(f"REVOKE EXECUTE ON FUNCTION {function} FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION audit_ensure_partitions(integer) TO darkroom_app")


def downgrade() -> None:
    for name in VIEWS:
        op.execute(f"DROP VIEW {name}")
    for role in ("darkroom_app", "darkroom_auditor"):
        op.execute(f"DROP OWNED BY {role}")
