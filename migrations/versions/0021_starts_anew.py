"""Keep for which revision of the fleet a worker left, so that others tell when it cannot return.

Works beside the previous version, which does not look at the column.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.add_columns("workers", [sa.Column("left_for_revision", sa.Integer(), nullable=True)])


def downgrade() -> None:
    op.drop_column("workers", "left_for_revision")
