"""Jobs say how many layers of the CLIP text encoder are left out at its end.

Works beside the code of the migrations before it: the column may be empty, and the view only gets
one more at its end.
"""

from importlib import import_module

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

told_jobs = import_module("migrations.versions.0007_told_jobs")
history = import_module("migrations.versions.0013_history_columns")

ACCEPTS_MORE = (
    ("strength double precision, adapters", "strength double precision, clip_skip integer, adapters"),
    ("strength, adapters, precision,", "strength, clip_skip, adapters, precision,"),
)
JOB_HISTORY = history.JOB_HISTORY.replace("j.metadata\n", "j.metadata, j.clip_skip\n")


def upgrade() -> None:
    online.add_columns("jobs", [sa.Column("clip_skip", sa.Integer(), nullable=True)])
    told_jobs._rewrite_accept_jobs(ACCEPTS_MORE)
    op.execute(f"CREATE OR REPLACE VIEW job_history AS {JOB_HISTORY}")


def downgrade() -> None:
    """A view cannot lose columns: it is made anew."""
    op.execute("DROP VIEW job_history")
    history.upgrade()
    op.execute("GRANT SELECT ON job_history TO darkroom_app, darkroom_auditor")
    told_jobs._rewrite_accept_jobs([(after, before) for before, after in ACCEPTS_MORE])
    op.drop_column("jobs", "clip_skip")
