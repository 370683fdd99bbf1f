"""Keep the devices that workers have lost, and which of them get no worker.

Works beside the previous version, which notes none.
"""

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "lost_devices",
        sa.Column("device", sa.Text(), primary_key=True),
        sa.Column("loss", sa.Uuid(), nullable=False),
        sa.Column("lost_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("capacity_class", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("quarantined_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("problem", sa.Text(), nullable=True),
    )
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON lost_devices TO darkroom_app")


def downgrade() -> None:
    op.execute("DROP VIEW IF EXISTS workers_now")  # which shows them; made anew from its file
    op.drop_table("lost_devices")
