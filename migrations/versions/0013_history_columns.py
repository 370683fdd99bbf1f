"""Show every parameter of a job in job_history, and the metadata that its tenant keeps with it.

Works beside the code of the migrations before it: the view only gets further columns at its end.
"""

from importlib import import_module

from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

COMMENT = "One row per job: what was asked, where the time went, what it cost. Newest first by accepted_at."
JOB_HISTORY = """
    SELECT j.id AS job_id, t.name AS tenant, j.state, j.tier, j.pool, j.model, j.model_version,
           j.prompt, j.negative_prompt, j.width_px || 'x' || j.height_px AS size, j.num_steps,
           j.guidance, j.sampler, j.seed, j.num_images, j.output_format, j.precision, j.determinism,
           j.bucket_rows, j.accepted_at, j.started_at, j.rendered_at, j.finished_at,
           round(extract(epoch FROM j.started_at - j.accepted_at), 3) AS queue_s,
           round(extract(epoch FROM j.rendered_at - j.started_at), 3) AS render_s,
           round(extract(epoch FROM j.finished_at - j.rendered_at), 3) AS store_s,
           round(extract(epoch FROM j.finished_at - j.accepted_at), 3) AS total_s,
           j.attempt AS attempts, j.worker, a.device,
           coalesce(a.max_images, 0) AS max_batch_images, coalesce(a.max_rows, 0) AS max_batch_rows,
           coalesce(a.steps, 0) AS steps_run, coalesce(a.shared_steps, 0) AS steps_shared,
           round(j.device_seconds::numeric, 4) AS gpu_seconds, j.cost, j.currency, j.failure_code,
           j.failure_detail, i.stored AS images_stored,
           CASE WHEN j.state IN ('canceled', 'rejected') THEN i.steps_unstored ELSE 0
               END AS steps_abandoned,
           j.model_alias, j.init_file_id, j.mask_file_id, j.control_file_id, j.strength, j.adapters,
           j.metadata
    FROM jobs j
    JOIN tenants t ON t.id = j.tenant_id
    LEFT JOIN LATERAL (
        SELECT max(device) AS device, max(max_images) AS max_images, max(max_rows) AS max_rows,
               sum(steps) AS steps, sum(shared_steps) AS shared_steps
        FROM attempts WHERE attempts.job_id = j.id
    ) a ON true
    LEFT JOIN LATERAL (
        SELECT count(*) FILTER (WHERE i.state = 'stored') AS stored,
               coalesce(sum(i.steps_done) FILTER (WHERE i.state <> 'stored'), 0) AS steps_unstored
        FROM images i WHERE i.job_id = j.id
    ) i ON true
"""


def upgrade() -> None:
    _replace(JOB_HISTORY)


def downgrade() -> None:
    """A view cannot lose columns: it is made anew as 0008 made it."""
    before = import_module("migrations.versions.0003_views_and_roles").VIEWS["job_history"][1]
    unfinished = import_module("migrations.versions.0008_unfinished_work")
    op.execute("DROP VIEW job_history")
    head, tail = before.split("FROM jobs j", 1)
    abandoned = "CASE WHEN j.state IN ('canceled', 'rejected') THEN i.steps_unstored ELSE 0 END"
    columns = f"i.stored AS images_stored, {abandoned} AS steps_abandoned"
    _replace(f"{head.rstrip()}, {columns} FROM jobs j{tail}{unfinished.OF_IMAGES}")
    op.execute("GRANT SELECT ON job_history TO darkroom_app, darkroom_auditor")


def _replace(query: str) -> None:
    op.execute(f"CREATE OR REPLACE VIEW job_history AS {query}")
    op.execute(f"COMMENT ON VIEW job_history IS '{COMMENT}'")
