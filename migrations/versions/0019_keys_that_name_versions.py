"""Let keys have the scope `versions`, with which a request may name a version of a model.

Works beside the previous version, which does not know the scope and gives it to no key.
"""

from alembic import op

from migrations import online

revision = "0019"
down_revision = "0018"
branch_labels = None
depends_on = None

NAME = "api_keys_scopes_are_known"


def upgrade() -> None:
    known = "ARRAY['generate', 'read', 'admin', 'versions']"
    online.drop_check("api_keys", NAME)
    online.add_check("api_keys", NAME, f"scopes <@ {known} AND scopes <> '{{}}'")


def downgrade() -> None:
    # A key that may do nothing else has nothing left to do, and some scope it must have.
    op.execute(
        "UPDATE api_keys SET scopes = '{read}', revoked_at = coalesce(revoked_at, now())"
        " WHERE scopes = '{versions}'"
    )
    op.execute("UPDATE api_keys SET scopes = array_remove(scopes, 'versions')")
    op.drop_constraint(NAME, "api_keys")
    known = "ARRAY['generate', 'read', 'admin']"
    op.create_check_constraint(NAME, "api_keys", f"scopes <@ {known} AND scopes <> '{{}}'")
