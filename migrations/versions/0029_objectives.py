"""Keep how far tiers' objectives are met, and of jobs what that is counted from.

Works beside the previous version, whose jobs have neither a promised end nor a first preview.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0029"
down_revision = "0028"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.add_columns(
        "jobs",
        [
            sa.Column("eta_p90_s", sa.Double(), nullable=True),
            sa.Column("first_preview_at", sa.DateTime(timezone=True), nullable=True),
        ],
    )
    online.create_index("jobs_expired", "jobs", ["finished_at"], where="state = 'expired'")
    op.create_table(
        "slo_targets",
        sa.Column("tier", sa.Text(), primary_key=True),
        sa.Column("objective", sa.Text(), primary_key=True),
        sa.Column("target", sa.Double(), nullable=False),
    )
    op.create_table(
        "slo_counts",
        sa.Column("tier", sa.Text(), primary_key=True),
        sa.Column("objective", sa.Text(), primary_key=True),
        sa.Column("bucket", sa.DateTime(timezone=True), primary_key=True),
        sa.Column("good", sa.BigInteger(), nullable=False),
        sa.Column("total", sa.BigInteger(), nullable=False),
    )
    for table in ("slo_targets", "slo_counts"):
        op.execute(f"GRANT SELECT, INSERT, UPDATE, DELETE ON {table} TO darkroom_app")


def downgrade() -> None:
    op.execute("DROP VIEW IF EXISTS slo_attainment")
    op.drop_table("slo_counts")
    op.drop_table("slo_targets")
    online.drop_index("jobs_expired")
    op.drop_column("jobs", "first_preview_at")
    op.drop_column("jobs", "eta_p90_s")
