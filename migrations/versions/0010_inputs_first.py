"""Pictures first: a job that starts from pictures waits for them before it is announced, in nobody's way.

Works beside the code of 0005: a trigger marks the jobs that old code accepts; a worker to whom old code announces one leaves it until its
pictures are there. Until the last old process is gone its releases find waiting jobs by another index, more slowly.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

FLOW = ["pool", "tier", "tenant_id"]
ORDER = ["release_tag", "id"]
WAITING = "state = 'queued' AND announced_at IS NULL"
BEFORE = {"jobs_waiting": ["pool", "tier", *ORDER], "jobs_waiting_by_tenant": [*FLOW, *ORDER]}
NEW = {
    "jobs_ready": (["pool", "tier", *ORDER], f"{WAITING} AND NOT lacks_inputs"),
    "jobs_ready_by_tenant": ([*FLOW, *ORDER], f"{WAITING} AND NOT lacks_inputs"),
    "jobs_lacking_inputs": (["pool", "tier", *ORDER], "state = 'queued' AND lacks_inputs"),
    "jobs_lacking_inputs_by_tenant": ([*FLOW, *ORDER], "state = 'queued' AND lacks_inputs"),
    "jobs_inputs_asked": (["pool", "tier"], "state = 'queued' AND inputs_asked_at IS NOT NULL"),
}

MARK = """
CREATE FUNCTION jobs_mark_lacking_inputs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.lacks_inputs := true;
    RETURN NEW;
END $$
"""
TRIGGER = """
CREATE TRIGGER jobs_mark_lacking_inputs BEFORE INSERT ON jobs FOR EACH ROW
    WHEN (NEW.init_file_id IS NOT NULL OR NEW.control_file_id IS NOT NULL) EXECUTE FUNCTION jobs_mark_lacking_inputs()
"""


def upgrade() -> None:
    lacks_inputs = sa.Column("lacks_inputs", sa.Boolean(), server_default=sa.text("false"), nullable=False)
    online.add_columns("jobs", [lacks_inputs, sa.Column("inputs_asked_at", sa.DateTime(timezone=True), nullable=True)])
    for name, (columns, where) in NEW.items():
        online.create_index(name, "jobs", columns, where=where)
    for name in BEFORE:
        online.drop_index(name)
    op.execute(MARK)
    op.execute(TRIGGER)


def downgrade() -> None:
    for name, columns in BEFORE.items():
        op.create_index(name, "jobs", columns, postgresql_where=sa.text(WAITING))
    for name in NEW:
        op.drop_index(name, "jobs")
    op.execute("DROP TRIGGER jobs_mark_lacking_inputs ON jobs")
    op.execute("DROP FUNCTION jobs_mark_lacking_inputs")
    op.drop_column("jobs", "inputs_asked_at")
    op.drop_column("jobs", "lacks_inputs")
