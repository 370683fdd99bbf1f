"""Let a job start from a picture and leave the strength to its model's pipeline.

Works beside the previous version: what that writes meets the new check.
"""

from alembic import op

from migrations import online

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    condition = "strength IS NULL OR init_file_id IS NOT NULL"
    online.add_check("jobs", "jobs_strength_needs_init", condition)
    online.drop_check("jobs", "jobs_strength_with_init")


def downgrade() -> None:
    op.execute("UPDATE jobs SET strength = 1 WHERE strength IS NULL AND init_file_id IS NOT NULL")
    op.create_check_constraint(
        "jobs_strength_with_init", "jobs", "(init_file_id IS NULL) = (strength IS NULL)"
    )
    op.drop_constraint("jobs_strength_needs_init", "jobs")
