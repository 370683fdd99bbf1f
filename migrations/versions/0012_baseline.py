"""Create every table of the first release, in one step.

It has the number of the last of the twelve migrations that it stands for, and makes what they made:
a database that was migrated by those is at this revision already.
"""

from pathlib import Path

from alembic import op

from migrations import living, roles
from models.tables import Base

revision = "0012"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    roles.create(op.get_bind())
    statements = Path(__file__).with_suffix(".sql").read_text()
    op.get_bind().exec_driver_sql(statements, execution_options={"no_parameters": True})


def downgrade() -> None:
    """Leave nothing but the roles, which belong to the whole server."""
    tables = ", ".join(table.name for table in Base.metadata.sorted_tables)
    op.execute(f"DROP TABLE IF EXISTS {tables} CASCADE")
    living.drop_all(op.get_bind())
    roles.revoke_all(op.get_bind())
