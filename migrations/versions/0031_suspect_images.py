"""Note on images that they probably show nothing.

Works beside the previous version, which looks at none.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0031"
down_revision = "0030"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.add_columns("images", [sa.Column("suspect", sa.Text(), nullable=True)])


def downgrade() -> None:
    op.execute("DROP VIEW IF EXISTS job_history")  # which counts them; made anew from its file
    op.drop_column("images", "suspect")
