"""What is stored is paid also when its job does not succeed, the work of jobs that were taken back counts, and lost steps are known.

Works beside the code of 0005: new columns have defaults, and views only get further columns at their end. Jobs that ended before
are left as they were booked.
"""

from importlib import import_module

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

USAGE_BY_TENANT_DAY = (
    "One row per tenant and UTC day: megapixel-steps reserved by jobs under way, settled for stored images, and abandoned, which were "
    "done on images of canceled jobs that were never stored; and money, for the stored ones. Quotas count all three.",
    """
    SELECT u.day, t.name AS tenant, u.jobs_accepted, u.jobs_succeeded, u.reserved AS reserved_megapixel_steps,
           u.settled AS settled_megapixel_steps, u.cost, u.abandoned AS abandoned_megapixel_steps
    FROM usage_ledger u JOIN tenants t ON t.id = u.tenant_id
    """,
)

# As in 0003, and at its end what became of the images.
OF_IMAGES = """
    LEFT JOIN LATERAL (
        SELECT count(*) FILTER (WHERE i.state = 'stored') AS stored,
               coalesce(sum(i.steps_done) FILTER (WHERE i.state <> 'stored'), 0) AS steps_unstored
        FROM images i WHERE i.job_id = j.id
    ) i ON true
"""


def upgrade() -> None:
    online.add_columns("usage_ledger", [sa.Column("abandoned", sa.Numeric(18, 6), server_default=sa.text("0"), nullable=False)])
    online.add_columns("images", [sa.Column("reached_step", sa.Integer(), server_default=sa.text("0"), nullable=False)])
    comment, query = import_module("migrations.versions.0003_views_and_roles").VIEWS["job_history"]
    head, tail = query.split("FROM jobs j", 1)
    columns = "i.stored AS images_stored, CASE WHEN j.state IN ('canceled', 'rejected') THEN i.steps_unstored ELSE 0 END AS steps_abandoned"
    _replace("job_history", comment, f"{head.rstrip()}, {columns} FROM jobs j{tail}{OF_IMAGES}")
    _replace("usage_by_tenant_day", *USAGE_BY_TENANT_DAY)


def downgrade() -> None:
    """Views cannot lose columns: they are made anew as 0003 and 0005 made them."""
    for view, module in (("usage_by_tenant_day", "0005_the_door"), ("job_history", "0003_views_and_roles")):
        op.execute(f"DROP VIEW {view}")
        _replace(view, *import_module(f"migrations.versions.{module}").VIEWS[view])
        op.execute(f"GRANT SELECT ON {view} TO darkroom_app, darkroom_auditor")
    op.drop_column("images", "reached_step")
    op.drop_column("usage_ledger", "abandoned")


def _replace(view: str, comment: str, query: str) -> None:
    op.execute(f"CREATE OR REPLACE VIEW {view} AS {query}")
    op.execute(f"COMMENT ON VIEW {view} IS '{comment}'")
