"""Keep the revisions of the fleet, and by which of them a job was accepted.

Works beside the previous version, whose processes read fleet.toml: the columns may be empty.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.add_columns("jobs", [sa.Column("fleet_revision", sa.Integer(), nullable=True)])
    online.add_columns("workers", [sa.Column("fleet_revision", sa.Integer(), nullable=True)])
    now = sa.text("clock_timestamp()")
    op.create_table(
        "fleet_revisions",
        sa.Column("number", sa.Integer(), sa.Identity(always=True), primary_key=True),
        sa.Column("content", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("applied_at", sa.DateTime(timezone=True), nullable=False, server_default=now),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), nullable=True),
        sa.Column("rollback_of", sa.Integer(), nullable=True),
    )
    op.execute("GRANT SELECT, INSERT ON fleet_revisions TO darkroom_app")


def downgrade() -> None:
    # Those that read it are made anew from their files.
    op.execute("DROP VIEW IF EXISTS fleet_history, job_history, workers_now, dead_letters")
    op.drop_table("fleet_revisions")
    op.execute("DROP FUNCTION IF EXISTS fleet_revisions_refuse()")
    op.drop_column("workers", "fleet_revision")
    op.drop_column("jobs", "fleet_revision")
