"""Keep of a job which request made it, in whose trace, and how long its images waited for a step.

Works beside the previous version, whose jobs name none.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0030"
down_revision = "0029"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.add_columns(
        "jobs",
        [
            sa.Column("request_id", sa.Text(), nullable=True),
            sa.Column("traceparent", sa.Text(), nullable=True),
        ],
    )
    waited = sa.Column("waited_s", sa.Double(), server_default=sa.text("0"), nullable=False)
    online.add_columns("attempts", [waited])


def downgrade() -> None:
    op.execute("DROP VIEW IF EXISTS job_history")  # which shows them; made anew from its file
    op.drop_column("attempts", "waited_s")
    op.drop_column("jobs", "traceparent")
    op.drop_column("jobs", "request_id")
