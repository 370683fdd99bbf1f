"""Note on jobs how many tokens their prompts have, and how many of them were not read.

Works beside the previous version: the columns may be empty.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.add_columns(
        "jobs",
        [
            sa.Column("prompt_tokens", sa.Integer(), nullable=True),
            sa.Column("truncated_tokens", sa.Integer(), nullable=True),
        ],
    )


def downgrade() -> None:
    op.execute("DROP VIEW IF EXISTS job_history")  # which shows them; made anew from its file
    op.drop_column("jobs", "truncated_tokens")
    op.drop_column("jobs", "prompt_tokens")
