"""Keep tenants' monthly budgets, what was told of them, and what a webhook tells of no job.

Works beside the previous version, which tells nothing of budgets.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

from migrations import online

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None

NOT_NEGATIVE = "tenants_monthly_budget_is_not_negative"


def upgrade() -> None:
    online.add_columns("tenants", [sa.Column("monthly_budget", sa.Numeric(18, 6), nullable=True)])
    online.add_check("tenants", NOT_NEGATIVE, "monthly_budget >= 0")
    online.add_columns("webhook_deliveries", [sa.Column("data", postgresql.JSONB(), nullable=True)])
    op.create_table(
        "budget_alerts",
        sa.Column("tenant_id", sa.Uuid(), sa.ForeignKey("tenants.id"), primary_key=True),
        sa.Column("month", sa.Date(), primary_key=True),
        sa.Column("percent", sa.Integer(), primary_key=True, autoincrement=False),
        sa.Column(
            "told_at",
            sa.DateTime(timezone=True),
            server_default=sa.text("clock_timestamp()"),
            nullable=False,
        ),
    )
    op.execute("GRANT SELECT, INSERT, UPDATE, DELETE ON budget_alerts TO darkroom_app")


def downgrade() -> None:
    op.drop_table("budget_alerts")
    op.drop_column("webhook_deliveries", "data")
    online.drop_check("tenants", NOT_NEGATIVE)
    op.drop_column("tenants", "monthly_budget")
