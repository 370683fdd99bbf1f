"""Keep the capacity class of workers, and by which terms their attempts used the device.

Works beside the previous version: the columns may be empty, and then the pool's price holds. What
workers of a class learn of costs stands in rows of its own, under another name of their pool.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    none = sa.text("''")
    online.add_columns(
        "workers", [sa.Column("capacity_class", sa.Text(), nullable=False, server_default=none)]
    )
    online.add_columns(
        "attempts",
        [
            sa.Column("capacity_class", sa.Text(), nullable=False, server_default=none),
            sa.Column("market", sa.Text(), nullable=True),
            sa.Column("gpu_class", sa.Text(), nullable=True),
            sa.Column("gpu_hour_price", sa.Float(), nullable=True),
        ],
    )
    online.add_columns("images", [sa.Column("device_cost", sa.Numeric(24, 12), nullable=True)])


def downgrade() -> None:
    # It reads one of them, and is made anew from its file.
    op.execute("DROP VIEW IF EXISTS workers_now")
    op.drop_column("images", "device_cost")
    for column in ("capacity_class", "market", "gpu_class", "gpu_hour_price"):
        op.drop_column("attempts", column)
    op.drop_column("workers", "capacity_class")
