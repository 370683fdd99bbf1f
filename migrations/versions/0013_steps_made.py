"""Jobs say how many denoise steps each of their images makes, which quotas count: a picture to start from spares some.

Works beside the code of before: the column may be empty, and then an image makes, and its job counts, all the steps that were asked for.
So it stays with jobs that were accepted before, whose entries in the ledger are of all their steps.
"""

import re
from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

ACCEPTS_MORE = (
    ("megapixel_steps numeric(18, 6), metadata jsonb", "megapixel_steps numeric(18, 6), steps_per_image integer, metadata jsonb"),
    ("eta_raw_s, megapixel_steps, metadata,", "eta_raw_s, megapixel_steps, steps_per_image, metadata,"),
)


def upgrade() -> None:
    online.add_columns("jobs", [sa.Column("steps_per_image", sa.Integer(), nullable=True)])
    _rewrite_accept_jobs(ACCEPTS_MORE)


def downgrade() -> None:
    _rewrite_accept_jobs([(after, before) for before, after in ACCEPTS_MORE])
    op.drop_column("jobs", "steps_per_image")


def _rewrite_accept_jobs(changes: Sequence[tuple[str, str]]) -> None:
    """Change what it says of those columns and leave the rest of it as it stands, as migration 0007 does."""
    source = str(op.get_bind().scalar(sa.text("SELECT pg_get_functiondef('accept_jobs'::regproc)")))
    for before, after in changes:
        places = re.compile(r"\s+".join(map(re.escape, before.split())))
        if not places.search(source):
            raise RuntimeError(f"accept_jobs does not say: {before}")
        source = places.sub(after, source)
    op.execute(source)
