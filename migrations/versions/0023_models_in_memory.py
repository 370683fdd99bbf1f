"""Keep which of its models a worker has in its device's memory.

Works beside the previous version, which does not write it: empty means all that it serves.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0023"
down_revision = "0022"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.add_columns("workers", [sa.Column("loaded", sa.ARRAY(sa.Text()), nullable=True)])


def downgrade() -> None:
    op.execute("DROP VIEW IF EXISTS workers_now")
    op.drop_column("workers", "loaded")
