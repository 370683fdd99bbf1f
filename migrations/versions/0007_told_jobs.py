"""Jobs tell more of what was asked and what was read: the name that a request had for its model, and warnings about its texts.

Works beside the code of the migrations before it: both columns may be empty, and whoever accepts jobs without an alias leaves it so.
"""

import re
from collections.abc import Sequence

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects.postgresql import JSONB

from migrations import online

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# accept_jobs names the columns of a job three times: as it reads them, as it writes them, and as it takes them from what it read.
# These are changed where they stand rather than the whole function replaced: other migrations change other parts of it.
ACCEPTS_MORE = (
    ("model text, model_version text", "model text, model_alias text, model_version text"),
    ("metadata jsonb, requeue_of uuid", "metadata jsonb, warnings jsonb, requeue_of uuid"),
    ("metadata, requeue_of,", "metadata, warnings, requeue_of,"),
    (
        "pool, tier, model, model_version, prompt, negative_prompt, width_px, height_px, num_steps, guidance, sampler,",
        "pool, tier, model, model_alias, model_version, prompt, negative_prompt, width_px, height_px, num_steps, guidance, sampler,",
    ),
)


def upgrade() -> None:
    online.add_columns("jobs", [sa.Column("model_alias", sa.Text(), nullable=True), sa.Column("warnings", JSONB(), nullable=True)])
    _rewrite_accept_jobs(ACCEPTS_MORE)


def downgrade() -> None:
    _rewrite_accept_jobs([(after, before) for before, after in ACCEPTS_MORE])
    op.drop_column("jobs", "warnings")
    op.drop_column("jobs", "model_alias")


def _rewrite_accept_jobs(changes: Sequence[tuple[str, str]]) -> None:
    source = str(op.get_bind().scalar(sa.text("SELECT pg_get_functiondef('accept_jobs'::regproc)")))
    for before, after in changes:
        places = re.compile(r"\s+".join(map(re.escape, before.split())))
        if not places.search(source):
            raise RuntimeError(f"accept_jobs does not say: {before}")
        source = places.sub(after, source)
    op.execute(source)
