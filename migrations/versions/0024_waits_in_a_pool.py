"""Note on jobs since when they wait in their pool, for those that came from another one.

Works beside the previous version: the column may be empty.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    since = sa.Column("pool_since", sa.TIMESTAMP(timezone=True), nullable=True)
    online.add_columns("jobs", [since])


def downgrade() -> None:
    op.drop_column("jobs", "pool_since")
