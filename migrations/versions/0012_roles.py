"""A role for each kind of process, with rights of its own (migrations/roles.py), and workers that say after how long they count as gone.

Of jobs a worker sees those that are not over, or have not been for long: it needs their prompts, and not everybody's of last year.
Works beside the code of before: the operator's role keeps all its rights, and a worker that says nothing counts as gone after 15 s.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online, roles

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

FIXED = "w.seen_at > (clock_timestamp() - '00:00:15'::interval)"
OWN = "w.seen_at > (clock_timestamp() - make_interval(secs => w.silent_after_s))"


# Restrictive, and for the worker alone: a role that an operator has made for himself sees what it saw.
POLICIES = (
    "CREATE POLICY jobs_of_everybody ON jobs USING (true) WITH CHECK (true)",
    f"""CREATE POLICY jobs_under_way ON jobs AS RESTRICTIVE TO {roles.OF_PROCESS["worker"]}
        USING (finished_at IS NULL OR finished_at > now() - interval '1 hour') WITH CHECK (true)""",
)


def upgrade() -> None:
    online.add_columns("workers", [sa.Column("silent_after_s", sa.Double(), server_default=sa.text("15"), nullable=False)])
    roles.create(op.get_bind())
    _count_live_workers_by(FIXED, OWN)  # before `jobs` is locked: whoever reads the view locks it first, and then `jobs`
    for policy in POLICIES:
        op.execute(policy)
    op.execute("ALTER TABLE jobs ENABLE ROW LEVEL SECURITY")


def downgrade() -> None:
    _count_live_workers_by(OWN, FIXED)
    op.drop_column("workers", "silent_after_s")
    op.execute("ALTER TABLE jobs DISABLE ROW LEVEL SECURITY")
    for name in ("jobs_of_everybody", "jobs_under_way"):
        op.execute(f"DROP POLICY {name} ON jobs")
    roles.take_back(op.get_bind())


def _count_live_workers_by(was: str, will_be: str) -> None:
    """Change that condition of the view and leave the rest of it as it stands."""
    text = op.get_bind().execute(sa.text("SELECT pg_get_viewdef('queue_now'::regclass, true)")).scalar_one()
    if was not in text:
        raise RuntimeError("queue_now does not count live workers as it did")
    op.get_bind().exec_driver_sql(f"CREATE OR REPLACE VIEW queue_now AS {text.replace(was, will_be)}".replace("%", "%%"))
