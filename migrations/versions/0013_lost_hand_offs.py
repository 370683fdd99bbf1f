"""Count how often each image's pixels were lost before they were stored.

So a job that cannot be stored has an end. Works beside the previous version: the column has a
default.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    count = sa.Column("hand_offs_lost", sa.Integer(), server_default=sa.text("0"), nullable=False)
    online.add_columns("images", [count])


def downgrade() -> None:
    op.drop_column("images", "hand_offs_lost")
