"""Keep what workers' time is spent on, and of attempts what they had in hand when they ended.

Works beside the previous version, which writes none of it: its time is then not in the views.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None

SECONDS = ("billed", "startup", "idle", "turns", "loads", "encode", "denoise", "decode", "padding")
ADDED = {"images": ("padding_s",), "attempts": ("padding_s", "unfinished_s")}
READING = ("costs_by_pool_day", "costs_by_tenant_day", "device_time_by_hour", "wasted_time_by_day")


def seconds(name: str) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), server_default=sa.text("0"), nullable=False)


def upgrade() -> None:
    op.create_table(
        "device_time",
        sa.Column("worker", sa.Text(), primary_key=True),
        sa.Column("instance", sa.Uuid(), primary_key=True),
        sa.Column("since", sa.DateTime(timezone=True), primary_key=True),
        sa.Column(
            "until",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
        sa.Column("pool", sa.Text(), nullable=False),
        sa.Column("capacity_class", sa.Text(), nullable=False),
        sa.Column("market", sa.Text(), nullable=True),
        sa.Column("gpu_class", sa.Text(), nullable=True),
        sa.Column("gpu_hour_price", sa.Double(), nullable=True),
        *(seconds(f"{name}_s") for name in SECONDS),
    )
    op.create_index("device_time_since", "device_time", ["since"])
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON device_time TO darkroom_app")
    for table, names in ADDED.items():
        online.add_columns(table, [seconds(name) for name in names])


def downgrade() -> None:
    for view in READING:
        op.execute(f"DROP VIEW IF EXISTS {view}")
    op.drop_table("device_time")
    for table, names in ADDED.items():
        for name in names:
            op.drop_column(table, name)
