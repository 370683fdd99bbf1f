"""Keep what workers describe each version of a model to be able to do.

Works beside the previous version, which does not look at the table.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0018"
down_revision = "0017"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "capabilities",
        sa.Column("model", sa.Text(), primary_key=True),
        sa.Column("version", sa.Text(), primary_key=True),
        sa.Column("described", postgresql.JSONB(), nullable=False),
        sa.Column("worker", sa.Text(), nullable=False),
        sa.Column(
            "published_at",
            sa.DateTime(timezone=True),
            nullable=False,
            server_default=sa.text("clock_timestamp()"),
        ),
    )
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON capabilities TO darkroom_app")


def downgrade() -> None:
    op.drop_table("capabilities")
