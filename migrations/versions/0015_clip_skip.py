"""Note on jobs how many layers of the CLIP text encoder are left out at its end.

Works beside the previous version: the column may be empty.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.add_columns("jobs", [sa.Column("clip_skip", sa.Integer(), nullable=True)])


def downgrade() -> None:
    op.execute("DROP VIEW IF EXISTS job_history")  # which shows it; made anew from its file
    op.drop_column("jobs", "clip_skip")
