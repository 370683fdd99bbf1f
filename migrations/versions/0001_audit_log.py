"""An append-only audit log: every event is linked by hash to the one before it in its chain.

The link is made by a trigger, so no application can skip or forge it; the application role may INSERT and nothing else.
A superuser can still rewrite history, but not without `audit_verify` telling where. Months are partitions from the start.
"""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# What is hashed, in this order; `at` as whole microseconds, for text forms of instants depend on settings.
DIGEST = """
CREATE FUNCTION audit_digest(prev_hash bytea, chain_id text, seq bigint, id uuid, at timestamptz, event text, actor text,
                             job_id uuid, attempt integer, facts jsonb) RETURNS bytea
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT sha256(convert_to(jsonb_build_array(encode(prev_hash, 'hex'), chain_id, seq, id, (extract(epoch FROM at) * 1000000)::bigint,
                                               event, actor, job_id, attempt, facts)::text, 'UTF8'))
$$
"""

# Locks the chain's head until commit; `at` is left alone, for a BEFORE trigger may not move a row to another partition.
LINK = """
CREATE FUNCTION audit_link() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE head audit_chains%ROWTYPE;
BEGIN
    INSERT INTO audit_chains AS c (chain_id) VALUES (NEW.chain_id)
        ON CONFLICT (chain_id) DO UPDATE SET last_seq = c.last_seq RETURNING * INTO head;
    NEW.seq := head.last_seq + 1;
    NEW.prev_hash := head.last_hash;
    NEW.hash := audit_digest(NEW.prev_hash, NEW.chain_id, NEW.seq, NEW.id, NEW.at, NEW.event, NEW.actor,
                             NEW.job_id, NEW.attempt, NEW.facts);
    UPDATE audit_chains SET last_seq = NEW.seq, last_hash = NEW.hash WHERE chain_id = NEW.chain_id;
    RETURN NEW;
END $$
"""

REFUSE = """
CREATE FUNCTION audit_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END $$
"""

# Rows that came before their partition lie in the default one, where they do no harm; so a clash is not an error.
PARTITIONS = """
CREATE FUNCTION audit_ensure_partitions(months_ahead integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE first timestamp; name text;
BEGIN
    FOR ahead IN 0..months_ahead LOOP
        first := date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => ahead);
        name := 'audit_events_' || to_char(first, 'YYYY_MM');
        IF to_regclass(name) IS NULL THEN
            BEGIN
                EXECUTE format('CREATE TABLE %I PARTITION OF audit_events FOR VALUES FROM (%L) TO (%L)',
                               name, first || '+00', (first + interval '1 month') || '+00');
                -- Row triggers come with the table that is partitioned; this one, per statement, does not.
                EXECUTE format('CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON %I
                                FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()', name);
            EXCEPTION WHEN check_violation THEN
                RAISE WARNING 'partition % not made: the default partition holds rows of that month', name;
            END;
        END IF;
    END LOOP;
END $$
"""

VERIFY = """
CREATE FUNCTION audit_verify(chain text DEFAULT NULL) RETURNS TABLE (chain_id text, seq bigint, event_id uuid, problem text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    WITH linked AS (
        SELECT e.*, lag(e.seq) OVER w AS before_seq, lag(e.hash) OVER w AS before_hash
        FROM audit_events e WHERE chain IS NULL OR e.chain_id = chain
        WINDOW w AS (PARTITION BY e.chain_id ORDER BY e.seq, e.at)
    ), heads AS (
        SELECT c.chain_id, c.last_seq, c.last_hash, t.seq, t.hash
        FROM audit_chains c
        LEFT JOIN LATERAL (SELECT l.seq, l.hash FROM linked l WHERE l.chain_id = c.chain_id ORDER BY l.seq DESC LIMIT 1) t ON true
        WHERE chain IS NULL OR c.chain_id = chain
    )
    SELECT l.chain_id, l.seq, l.id, 'the event was changed: its hash does not fit its content' FROM linked l
        WHERE l.hash <> audit_digest(l.prev_hash, l.chain_id, l.seq, l.id, l.at, l.event, l.actor, l.job_id, l.attempt, l.facts)
    UNION ALL
    SELECT l.chain_id, l.seq, l.id, 'events are missing before this one' FROM linked l WHERE l.seq <> coalesce(l.before_seq, 0) + 1
    UNION ALL
    SELECT l.chain_id, l.seq, l.id, 'the link to the event before is broken' FROM linked l
        WHERE l.seq = coalesce(l.before_seq, 0) + 1 AND l.prev_hash <> coalesce(l.before_hash, ''::bytea)
    UNION ALL
    SELECT h.chain_id, h.last_seq, NULL::uuid, 'the newest events are missing' FROM heads h
        WHERE h.seq IS DISTINCT FROM h.last_seq OR h.hash IS DISTINCT FROM h.last_hash
    UNION ALL
    SELECT DISTINCT l.chain_id, 0::bigint, NULL::uuid, 'the chain has no head' FROM linked l
        WHERE NOT EXISTS (SELECT FROM audit_chains c WHERE c.chain_id = l.chain_id)
    ORDER BY 1, 2
$$
"""


def upgrade() -> None:
    op.create_table(
        "audit_chains",
        sa.Column("chain_id", sa.Text(), nullable=False),
        sa.Column("last_seq", sa.BigInteger(), server_default=sa.text("0"), nullable=False),
        sa.Column("last_hash", sa.LargeBinary(), server_default=sa.text("'\\x'::bytea"), nullable=False),
        sa.PrimaryKeyConstraint("chain_id"),
    )
    op.create_table(
        "audit_events",
        sa.Column("id", sa.Uuid(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("chain_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("event", sa.Text(), nullable=False),
        sa.Column("actor", sa.Text(), nullable=False),
        sa.Column("job_id", sa.Uuid(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=True),
        sa.Column("facts", postgresql.JSONB(), nullable=False),
        sa.Column("prev_hash", sa.LargeBinary(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("id", "at"),
        postgresql_partition_by="RANGE (at)",
    )
    op.create_index("audit_events_by_chain", "audit_events", ["chain_id", "seq"], unique=False)
    op.create_index("audit_events_by_job", "audit_events", ["job_id"], unique=False)
    for statement in (DIGEST, LINK, REFUSE, PARTITIONS, VERIFY):
        op.execute(statement)
    op.execute("CREATE TABLE audit_events_default PARTITION OF audit_events DEFAULT")
    op.execute("SELECT audit_ensure_partitions(2)")
    op.execute("CREATE TRIGGER audit_link BEFORE INSERT ON audit_events FOR EACH ROW EXECUTE FUNCTION audit_link()")
    op.execute("CREATE TRIGGER audit_no_change BEFORE UPDATE OR DELETE ON audit_events FOR EACH ROW EXECUTE FUNCTION audit_refuse()")
    for table in ("audit_events", "audit_events_default"):
        op.execute(f"CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON {table} FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()")


def downgrade() -> None:
    op.drop_table("audit_events")
    op.drop_table("audit_chains")
    for function in ("audit_verify", "audit_ensure_partitions", "audit_refuse", "audit_link", "audit_digest"):
        op.execute(f"DROP FUNCTION {function}")
