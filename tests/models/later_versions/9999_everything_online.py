"""A migration as a later version may have one.

Everything that `migrations.online` can do to tables in use.
"""

import sqlalchemy as sa
from alembic import op

from migrations import VERSIONS, online

revision = "9999"
down_revision = max(path.name.partition("_")[0] for path in VERSIONS[0].glob("*.py"))
branch_labels = None
depends_on = None


def upgrade() -> None:
    online.add_columns(
        "jobs",
        [
            sa.Column("later_file_id", sa.Uuid(), nullable=True),
            sa.Column("later_count", sa.Integer(), server_default=sa.text("0"), nullable=False),
        ],
    )
    online.add_columns("tenants", [sa.Column("later", sa.Text(), nullable=True)])
    online.add_check("jobs", "jobs_later_count_is_not_negative", "later_count >= 0")
    online.add_foreign_key("jobs", "later_file_id", "files")
    online.create_index("jobs_later", "jobs", ["later_file_id"], where="later_file_id IS NOT NULL")
    online.create_index("tenants_later", "tenants", ["later"], unique=True)
    online.replace_index(
        "jobs_running", "jobs", ["pool", "tier", "later_count"], where="state = 'running'"
    )
    online.drop_index("jobs_dead")
    online.run_in_pieces(
        "tenants", "UPDATE tenants SET later = name WHERE id > :after AND id <= :upto", rows=2
    )
    op.execute("CREATE TABLE later_things (id uuid PRIMARY KEY)")
    op.execute("DROP VIEW IF EXISTS flows_now")  # as if it read what is taken away here
