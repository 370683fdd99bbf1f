"""Fair release: tenants' flows and their virtual clocks, what jobs were seen to take, and what an attempt leaves to the next one.

Works beside the code of 0003: new columns have defaults, and a job that old code inserts is counted by the trigger and gets
a release tag by the wall clock, from which the virtual clocks start as well. Writers wait while queued jobs are counted, about a second
for a million.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

WAITING = "state = 'queued' AND announced_at IS NULL"
INDEXES: dict[str, tuple[list[str], str | None]] = {
    "jobs_run_by": (["run_by"], "state = 'queued' AND run_by IS NOT NULL"),
    "jobs_waiting_by_tenant": (["pool", "tier", "tenant_id", "release_tag", "id"], WAITING),
    "jobs_oldest": (["pool", "tier", "accepted_at"], "state = 'queued'"),
    "jobs_succeeded": (["finished_at"], "state = 'succeeded'"),
    "jobs_dead": (["finished_at"], "state = 'failed'"),
    "jobs_requeued": (["requeue_of"], "requeue_of IS NOT NULL"),
    "jobs_by_tenant_state": (["tenant_id", "state", "id"], None),
}

# Without lease_expires_at, which 0002 had in it: every renewal left a dead entry in this and in every other index of the table, and
# whoever counts what runs read them all until the next vacuum, which is far away when a million rows wait.
RUNNING = ["pool", "tier"]
RUNNING_BEFORE = ["pool", "tier", "lease_expires_at"]

# Row by row and in the same transaction: the sums are exact, and nobody has to count a backlog of a million rows.
COUNT_QUEUED = """
CREATE FUNCTION flows_count_queued() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE sign integer := CASE WHEN NEW.state = 'queued' THEN 1 ELSE -1 END;
BEGIN
    INSERT INTO flows AS f (pool, tier, tenant_id, queued_jobs, queued_images, queued_s)
        VALUES (NEW.pool, NEW.tier, NEW.tenant_id, sign, sign * NEW.num_images, sign * NEW.predicted_s)
        ON CONFLICT (pool, tier, tenant_id) DO UPDATE SET
            queued_jobs = f.queued_jobs + sign,
            queued_images = f.queued_images + sign * NEW.num_images,
            -- An empty flow has nothing queued, whatever a million additions of fractions have left.
            queued_s = CASE WHEN f.queued_jobs + sign = 0 THEN 0 ELSE greatest(0, f.queued_s + sign * NEW.predicted_s) END;
    RETURN NULL;
END $$
"""
TRIGGERS = (
    """CREATE TRIGGER flows_count_accepted AFTER INSERT ON jobs FOR EACH ROW WHEN (NEW.state = 'queued')
       EXECUTE FUNCTION flows_count_queued()""",
    """CREATE TRIGGER flows_count_moved AFTER UPDATE OF state ON jobs FOR EACH ROW
       WHEN ((OLD.state = 'queued') <> (NEW.state = 'queued')) EXECUTE FUNCTION flows_count_queued()""",
)

# Reads the flows' sums and the rows in hand, which are bounded; never the backlog.
QUEUE_NOW = """
WITH queued AS (
    SELECT pool, tier, sum(queued_jobs)::bigint AS jobs, sum(queued_images)::bigint AS images FROM flows
    WHERE queued_jobs > 0 GROUP BY pool, tier
), announced AS (
    SELECT pool, tier, count(*) AS jobs FROM jobs WHERE state = 'queued' AND announced_at IS NOT NULL GROUP BY pool, tier
), running AS (
    SELECT pool, tier, count(*) AS jobs, sum(num_images) AS images FROM jobs WHERE state = 'running' GROUP BY pool, tier
), storing AS (
    SELECT pool, tier, count(*) AS jobs, sum(num_images) AS images FROM jobs WHERE state = 'storing' GROUP BY pool, tier
), places AS (
    SELECT pool, tier FROM queued UNION SELECT pool, tier FROM running UNION SELECT pool, tier FROM storing
)
SELECT p.pool, p.tier,
       coalesce(queued.jobs, 0) - coalesce(announced.jobs, 0) AS waiting,
       coalesce(announced.jobs, 0) AS announced,
       coalesce(running.jobs, 0) AS running,
       coalesce(storing.jobs, 0) AS storing,
       coalesce(queued.images, 0) + coalesce(running.images, 0) + coalesce(storing.images, 0) AS images,
       round(extract(epoch FROM clock_timestamp() - (
           SELECT j.accepted_at FROM jobs j WHERE j.pool = p.pool AND j.tier = p.tier AND j.state = 'queued'
           ORDER BY j.accepted_at LIMIT 1)), 1) AS oldest_wait_s,
       (SELECT count(*) FROM workers w WHERE w.pool = p.pool AND w.seen_at > clock_timestamp() - interval '15 seconds') AS live_workers
FROM places p
LEFT JOIN queued USING (pool, tier)
LEFT JOIN announced USING (pool, tier)
LEFT JOIN running USING (pool, tier)
LEFT JOIN storing USING (pool, tier)
"""

VIEWS = {
    "dead_letters": (
        "One row per failed job: why, after how many tries, on which workers. To try one again: darkroom requeue JOB.",
        """
        SELECT j.id AS job_id, t.name AS tenant, j.pool, j.tier, j.model, j.failure_code, j.failure_detail AS last_error,
               j.attempt AS attempts, j.counted_attempts, a.workers, a.outcomes, j.accepted_at, j.finished_at, r.id AS requeued_as
        FROM jobs j
        JOIN tenants t ON t.id = j.tenant_id
        LEFT JOIN jobs r ON r.requeue_of = j.id
        LEFT JOIN LATERAL (
            SELECT string_agg(DISTINCT worker, ' ' ORDER BY worker) AS workers, string_agg(outcome, ' ' ORDER BY attempt) AS outcomes
            FROM attempts WHERE attempts.job_id = j.id
        ) a ON true
        WHERE j.state = 'failed'
        """,
    ),
    "flows_now": (
        "One row per tenant with queued jobs in a pool and tier: how much, and its weight in fair order.",
        """
        SELECT f.pool, f.tier, t.name AS tenant, t.weight, f.queued_jobs, f.queued_images, round(f.queued_s::numeric, 1) AS queued_gpu_s,
               round((f.finish_tag - c.virtual_s)::numeric, 1) AS ahead_s
        FROM flows f
        JOIN tenants t ON t.id = f.tenant_id
        LEFT JOIN fair_clocks c USING (pool, tier)
        WHERE f.queued_jobs > 0
        """,
    ),
}
NEW_TABLES = "flows, fair_clocks, learnt_costs, learnt_etas, uploads"


def upgrade() -> None:
    _add_columns()
    for name, (columns, condition) in INDEXES.items():
        online.create_index(name, "jobs", columns, unique=name == "jobs_requeued", where=condition)
    online.replace_index("jobs_running", "jobs", RUNNING, where="state = 'running'")
    _add_tables()
    op.execute(COUNT_QUEUED)
    for trigger in TRIGGERS:
        op.execute(trigger)
    op.execute(
        """INSERT INTO flows (pool, tier, tenant_id, queued_jobs, queued_images, queued_s)
           SELECT pool, tier, tenant_id, count(*), sum(num_images), sum(predicted_s) FROM jobs WHERE state = 'queued' GROUP BY 1, 2, 3"""
    )
    comment = op.get_bind().execute(sa.text("SELECT obj_description('queue_now'::regclass)")).scalar_one()
    op.execute("DROP VIEW queue_now")
    for name, (about, query) in {"queue_now": (comment, QUEUE_NOW), **VIEWS}.items():
        op.execute(f"CREATE VIEW {name} AS {query}")
        op.execute(f"COMMENT ON VIEW {name} IS '{about}'")
        op.execute(f"GRANT SELECT ON {name} TO darkroom_app, darkroom_auditor")
    op.execute(f"GRANT SELECT, INSERT, UPDATE ON {NEW_TABLES} TO darkroom_app")
    op.execute("GRANT DELETE ON uploads TO darkroom_app")


def downgrade() -> None:
    for name in (*VIEWS, "queue_now"):
        op.execute(f"DROP VIEW {name}")
    for trigger in ("flows_count_accepted", "flows_count_moved"):
        op.execute(f"DROP TRIGGER {trigger} ON jobs")
    op.execute("DROP FUNCTION flows_count_queued")
    for name in INDEXES:
        op.drop_index(name, "jobs")
    op.drop_index("jobs_running", "jobs")
    op.create_index("jobs_running", "jobs", RUNNING_BEFORE, postgresql_where=sa.text("state = 'running'"))
    for table in NEW_TABLES.split(", "):
        op.drop_table(table)
    for column in ("predicted_s", "eta_raw_s", "is_front", "run_within_s", "run_by", "requeue_of"):
        op.drop_column("jobs", column)
    for column in ("resumed_steps", "lost_steps", "lost_cause", "snapshot_bytes", "snapshot_store"):
        op.drop_column("attempts", column)
    op.drop_column("tenants", "weight")
    _restore_queue_now()


def _add_columns() -> None:
    zero = {"server_default": sa.text("0"), "nullable": False}
    online.add_columns("tenants", [sa.Column("weight", sa.Double(), server_default=sa.text("1"), nullable=False)])
    online.add_check("tenants", "tenants_weight_is_positive", "weight > 0")
    online.add_columns(
        "jobs",
        [
            sa.Column("predicted_s", sa.Double(), **zero),
            sa.Column("eta_raw_s", sa.Double()),
            sa.Column("is_front", sa.Boolean(), server_default=sa.text("false"), nullable=False),
            sa.Column("run_within_s", sa.Double()),
            sa.Column("run_by", sa.DateTime(timezone=True)),
            sa.Column("requeue_of", sa.Uuid()),
        ],
    )
    online.add_foreign_key("jobs", "requeue_of", "jobs")
    online.add_columns(
        "attempts",
        [
            sa.Column("resumed_steps", sa.Integer(), **zero),
            sa.Column("lost_steps", sa.Integer(), **zero),
            sa.Column("lost_cause", sa.Text()),
            sa.Column("snapshot_bytes", sa.BigInteger(), **zero),
            sa.Column("snapshot_store", sa.Text()),
        ],
    )


def _add_tables() -> None:
    op.create_table(
        "flows",
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("tier", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("finish_tag", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.Column("queued_jobs", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("queued_images", sa.Integer(), server_default=sa.text("0"), nullable=False),
        sa.Column("queued_s", sa.Double(), server_default=sa.text("0"), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id"], ["tenants.id"]),
        sa.PrimaryKeyConstraint("pool", "tier", "tenant_id"),
    )
    op.create_table(
        "fair_clocks",
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("tier", sa.Text(), nullable=False),
        sa.Column("virtual_s", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("pool", "tier"),
    )
    op.create_table(
        "learnt_costs",
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("width_px", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("height_px", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("row_step_s", sa.Double(), nullable=False),
        sa.Column("fixed_s", sa.Double(), nullable=False),
        sa.Column("observed", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("pool", "model", "width_px", "height_px"),
    )
    op.create_table(
        "learnt_etas",
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("tier", sa.Text(), nullable=False),
        sa.Column("ratio_p50", sa.Double(), nullable=False),
        sa.Column("ratio_p90", sa.Double(), nullable=False),
        sa.Column("observed", sa.Integer(), nullable=False),
        sa.Column("learnt_until", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("pool", "tier"),
    )
    op.create_table(
        "uploads",
        sa.Column("object_key", sa.Text(), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.PrimaryKeyConstraint("object_key"),
    )
    op.create_index("uploads_by_age", "uploads", ["started_at"], unique=False)


def _restore_queue_now() -> None:
    """As 0003 made it."""
    from importlib import import_module

    comment, query = import_module("migrations.versions.0003_views_and_roles").VIEWS["queue_now"]
    op.execute(f"CREATE VIEW queue_now AS {query}")
    op.execute(f"COMMENT ON VIEW queue_now IS '{comment}'")
    op.execute("GRANT SELECT ON queue_now TO darkroom_app, darkroom_auditor")
