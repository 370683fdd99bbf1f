"""Note on jobs how many denoise steps each of their images makes; quotas count these.

A picture to start from spares some steps. Works beside the previous version: the column may be
empty, and then an image makes, and its job counts, all the steps that were asked for. It stays
empty for jobs that were accepted before, whose entries in the ledger count all their steps.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.add_columns("jobs", [sa.Column("steps_per_image", sa.Integer(), nullable=True)])


def downgrade() -> None:
    op.execute("DROP VIEW IF EXISTS job_history")  # which reads it; made anew from its file
    op.drop_column("jobs", "steps_per_image")
