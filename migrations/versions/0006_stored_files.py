"""What a tenant's pictures take in the object store: counted as they come and go, with a limit of its own.

A trigger counts, so that code of before this migration is counted, too, and no path through the code can be forgotten. The count of what
is there already holds `files` against writers for as long as it takes to read it once.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

COUNT = """
CREATE FUNCTION count_stored_files() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    _files bigint := (CASE WHEN NEW.erased_at IS NULL THEN 1 ELSE 0 END)
        - (CASE WHEN TG_OP = 'UPDATE' AND OLD.erased_at IS NULL THEN 1 ELSE 0 END);
BEGIN
    IF _files <> 0 THEN
        INSERT INTO stored_files AS s (tenant_id, files, size_bytes) VALUES (NEW.tenant_id, _files, _files * NEW.size_bytes)
        ON CONFLICT (tenant_id) DO UPDATE SET files = s.files + excluded.files, size_bytes = s.size_bytes + excluded.size_bytes;
    END IF;
    RETURN NULL;
END $$
"""
VIEW = """
    SELECT t.name AS tenant, coalesce(s.files, 0) AS files, coalesce(s.size_bytes, 0) AS size_bytes, t.max_stored_bytes,
           round(s.size_bytes::numeric / nullif(t.max_stored_bytes, 0), 4) AS used_ratio
    FROM tenants t LEFT JOIN stored_files s ON s.tenant_id = t.id
"""
ABOUT = "One row per tenant: the pictures that it brought and did not erase, their bytes, and what of its limit they are."


def upgrade() -> None:
    online.add_columns("tenants", [sa.Column("max_stored_bytes", sa.BigInteger(), nullable=True)])
    online.add_check("tenants", "tenants_max_stored_bytes_is_not_negative", "max_stored_bytes >= 0")
    op.create_table(
        "stored_files",
        sa.Column("tenant_id", sa.Uuid(), sa.ForeignKey("tenants.id"), primary_key=True),
        sa.Column("files", sa.BigInteger(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
    )
    op.execute("GRANT SELECT, INSERT, UPDATE ON stored_files TO darkroom_app")
    op.execute(COUNT)
    op.execute("LOCK TABLE files IN SHARE ROW EXCLUSIVE MODE")
    op.execute("INSERT INTO stored_files SELECT tenant_id, count(*), sum(size_bytes) FROM files WHERE erased_at IS NULL GROUP BY tenant_id")
    op.execute(
        "CREATE TRIGGER files_are_counted AFTER INSERT OR UPDATE OF erased_at ON files FOR EACH ROW EXECUTE FUNCTION count_stored_files()"
    )
    op.execute(f"CREATE VIEW stored_files_by_tenant AS {VIEW}")
    op.execute(f"COMMENT ON VIEW stored_files_by_tenant IS '{ABOUT}'")
    op.execute("GRANT SELECT ON stored_files_by_tenant TO darkroom_app, darkroom_auditor")


def downgrade() -> None:
    op.execute("DROP VIEW stored_files_by_tenant")
    op.execute("DROP TRIGGER files_are_counted ON files")
    op.execute("DROP FUNCTION count_stored_files")
    op.drop_table("stored_files")
    op.drop_column("tenants", "max_stored_bytes")
