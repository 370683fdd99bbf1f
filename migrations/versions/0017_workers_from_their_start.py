"""Keep a worker's row from its start on: whose process it is, what it serves, what fails.

Works beside the previous version, whose workers write a row when they are ready: the columns may be
empty, and then a worker is ready and serves every model of its pool.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations import online

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    columns: list[sa.Column[object]] = [
        sa.Column("state", sa.Text(), nullable=False, server_default=sa.text("'ready'")),
        sa.Column("instance", sa.Uuid(), nullable=True),
        sa.Column("host", sa.Text(), nullable=True),
        sa.Column("pid", sa.Integer(), nullable=True),
        sa.Column("process", sa.Text(), nullable=True),
        sa.Column("held", postgresql.ARRAY(sa.Text()), nullable=True),
        sa.Column("failed", postgresql.JSONB(), nullable=False, server_default=sa.text("'{}'")),
        sa.Column("starts", sa.Integer(), nullable=False, server_default=sa.text("1")),
        sa.Column("failed_starts", sa.Integer(), nullable=False, server_default=sa.text("0")),
        sa.Column("problem", sa.Text(), nullable=True),
    ]
    online.add_columns("workers", columns)
    known = "state IN ('loading', 'ready', 'leaving', 'failed')"
    online.add_check("workers", "workers_state_is_known", known)


def downgrade() -> None:
    # Both read it; made anew from their files.
    op.execute("DROP VIEW IF EXISTS workers_now, queue_now")
    op.execute("DELETE FROM workers WHERE state IN ('loading', 'failed')")
    for column in (
        "state",
        "instance",
        "host",
        "pid",
        "process",
        "held",
        "failed",
        "starts",
        "failed_starts",
        "problem",
    ):
        op.drop_column("workers", column)
