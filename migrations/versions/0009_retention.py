"""What keeps tables from growing for ever and writers from waiting: months of the audit log made a year ahead and pruned, labels by tenant.

Works beside the code of before: a sweeper that asks for two months ahead gets them, and lists by metadata are slower, not wrong, until the
gateways know of `job_labels`.
"""

import sqlalchemy as sa
from alembic import op

from migrations import online

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

MONTHS_AHEAD = 12

# For whoever removes rows: the foreign keys that name them would each read a whole table for every row that goes.
INDEXES = {
    "jobs_replayed": ("jobs", "replay_of"),
    "jobs_by_init_file": ("jobs", "init_file_id"),
    "jobs_by_mask_file": ("jobs", "mask_file_id"),
    "jobs_by_control_file": ("jobs", "control_file_id"),
    "images_by_artifact": ("images", "artifact_id"),
    "idempotency_keys_by_job": ("idempotency_keys", "job_id"),
    "webhook_deliveries_of_job": ("webhook_deliveries", "job_id"),
}

# A month is made beside the log and attached to it, which writers do not notice: CREATE TABLE ... PARTITION OF would wait for every reader
# of the log, and every writer behind it. What has to wait are readers of the default partition, for 200 ms at most; then the sweeper
# tries again later. The default partition gets no CHECK that would spare its being read: while one stands, rows of that month are refused,
# and the partition is empty but after a year without a sweeper. Rows that came before their month lie there, where they do no harm.
PARTITIONS = """
CREATE OR REPLACE FUNCTION audit_ensure_partitions(months_ahead integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE first timestamp; name text;
BEGIN
    FOR ahead IN 0..least(months_ahead, 24) LOOP
        first := date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => ahead);
        name := 'audit_events_' || to_char(first, 'YYYY_MM');
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        BEGIN
            EXECUTE format('CREATE TABLE %I (LIKE audit_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', name);
            -- Row triggers and indexes come with the attaching; this trigger, per statement, does not.
            EXECUTE format('CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON %I
                            FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()', name);
            EXECUTE format('ALTER TABLE audit_events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                           name, first || '+00', (first + interval '1 month') || '+00');
        EXCEPTION
            WHEN check_violation THEN
                RAISE WARNING 'partition % not made: the default partition holds rows of that month', name;
            WHEN lock_not_available THEN
                RAISE WARNING 'partition % not made: somebody reads the log', name;
                EXIT;  -- the next one would be waited for in vain, too
        END;
    END LOOP;
END $$
"""

PARTITIONS_AHEAD = """
CREATE FUNCTION audit_partitions_ahead() RETURNS integer LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce(min(ahead), 25) - 1 FROM generate_series(0, 24) ahead
    WHERE to_regclass('audit_events_' || to_char(date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => ahead),
                                                 'YYYY_MM')) IS NULL
$$
"""

# In place of a month that was pruned stand the events that later ones link to: one of each chain that had any, as a rule.
CHECKPOINTS_DIGEST = """
CREATE FUNCTION audit_checkpoints_digest() RETURNS text LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT encode(sha256(convert_to(coalesce(string_agg(concat_ws(' ', chain_id, seq, encode(hash, 'hex')), E'\\n'
                                                        ORDER BY chain_id COLLATE "C", seq), ''), 'UTF8')), 'hex')
    FROM audit_checkpoints
$$
"""

# The owner's alone. A month is over for a day before it may go: by then nobody still writes into it. The digest of all checkpoints goes
# into the chain `system`, or whoever can write the table could pass off a hole in the log as something that was pruned.
PRUNE_MONTH = """
CREATE FUNCTION audit_prune_month(month date, actor text, more_facts jsonb DEFAULT '{}') RETURNS bigint
LANGUAGE plpgsql SET search_path = public, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE name text := 'audit_events_' || to_char(month, 'YYYY_MM'); events bigint; facts jsonb;
BEGIN
    IF (date_trunc('month', month::timestamp) + interval '1 month' + interval '1 day') > now() AT TIME ZONE 'UTC' THEN
        RAISE EXCEPTION 'the month % is not over', to_char(month, 'YYYY-MM') USING ERRCODE = 'invalid_parameter_value';
    END IF;
    EXECUTE format('SELECT count(*) FROM %I', name) INTO events;
    EXECUTE format($sql$
        INSERT INTO audit_checkpoints (chain_id, seq, hash)
            SELECT e.chain_id, e.seq, e.hash FROM (
                SELECT chain_id, seq, hash, lead(seq) OVER (PARTITION BY chain_id ORDER BY seq) AS next_seq FROM %1$I
            ) e
            WHERE e.next_seq IS DISTINCT FROM e.seq + 1 AND (
                EXISTS (SELECT FROM audit_events n WHERE n.chain_id = e.chain_id AND n.seq = e.seq + 1)
                OR EXISTS (SELECT FROM audit_chains c WHERE c.chain_id = e.chain_id AND c.last_seq = e.seq))
        ON CONFLICT (chain_id, seq) DO NOTHING
    $sql$, name);
    EXECUTE format('DELETE FROM audit_checkpoints c USING %I e WHERE e.chain_id = c.chain_id AND e.seq = c.seq + 1', name);
    LOCK TABLE audit_events IN ACCESS EXCLUSIVE MODE;  -- before the chain's head, as whoever appends does
    facts := more_facts || jsonb_build_object('month', to_char(month, 'YYYY-MM'), 'events', events,
                                              'checkpoints_sha256', audit_checkpoints_digest());
    INSERT INTO audit_events (id, chain_id, seq, event, actor, facts, prev_hash, hash)
        VALUES (gen_random_uuid(), 'system', 0, 'audit:month:pruned', actor, facts, '', '');
    EXECUTE format('ALTER TABLE audit_events DETACH PARTITION %I', name);
    EXECUTE format('DROP TABLE %I', name);
    RETURN events;
END $$
"""

# `since`: only events of then and later; those before are looked at where one of them links to them, and not otherwise.
VERIFY_SINCE = """
CREATE FUNCTION audit_verify_since(since timestamptz, chain text DEFAULT NULL)
RETURNS TABLE (chain_id text, seq bigint, event_id uuid, problem text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    WITH linked AS (
        SELECT known.*, lag(known.seq) OVER w AS before_seq, lag(known.hash) OVER w AS before_hash
        FROM (
            SELECT e.chain_id, e.seq, e.hash, e.prev_hash, e.id, e.at, e.event, e.actor, e.job_id, e.attempt, e.facts, true AS is_event
            FROM audit_events e WHERE (chain IS NULL OR e.chain_id = chain) AND (since IS NULL OR e.at >= since)
            UNION ALL
            SELECT c.chain_id, c.seq, c.hash, NULL, NULL, '-infinity', NULL, NULL, NULL, NULL, NULL, false
            FROM audit_checkpoints c WHERE chain IS NULL OR c.chain_id = chain
        ) known
        WINDOW w AS (PARTITION BY known.chain_id ORDER BY known.seq, known.at)
    ), events AS (
        SELECT l.*, l.seq = coalesce(l.before_seq, 0) + 1 AS follows FROM linked l WHERE l.is_event
    ), before AS MATERIALIZED (
        SELECT e.chain_id, e.seq, p.hash FROM events e JOIN audit_events p ON p.chain_id = e.chain_id AND p.seq = e.seq - 1
        WHERE since IS NOT NULL AND NOT e.follows AND p.at < since
    ), pruned AS (
        SELECT e.seq, e.id, e.facts ->> 'checkpoints_sha256' AS digest FROM audit_events e
        WHERE e.chain_id = 'system' AND e.event = 'audit:month:pruned' ORDER BY e.seq DESC LIMIT 1
    )
    SELECT e.chain_id, e.seq, e.id, 'the event was changed: its hash does not fit its content' FROM events e
        WHERE e.hash <> audit_digest(e.prev_hash, e.chain_id, e.seq, e.id, e.at, e.event, e.actor, e.job_id, e.attempt, e.facts)
    UNION ALL
    SELECT e.chain_id, e.seq, e.id, 'events are missing before this one' FROM events e
        WHERE NOT e.follows AND NOT EXISTS (SELECT FROM before b WHERE b.chain_id = e.chain_id AND b.seq = e.seq)
    UNION ALL
    SELECT e.chain_id, e.seq, e.id, 'the link to the event before is broken' FROM events e
        WHERE e.follows AND e.prev_hash <> coalesce(e.before_hash, ''::bytea)
    UNION ALL
    SELECT e.chain_id, e.seq, e.id, 'the link to the event before is broken' FROM events e JOIN before b USING (chain_id, seq)
        WHERE e.prev_hash <> b.hash
    UNION ALL
    SELECT h.chain_id, h.last_seq, NULL::uuid, 'the newest events are missing' FROM audit_chains h
        WHERE (chain IS NULL OR h.chain_id = chain) AND h.last_seq > 0 AND (
            NOT EXISTS (SELECT FROM audit_events e WHERE e.chain_id = h.chain_id AND e.seq = h.last_seq AND e.hash = h.last_hash
                        UNION ALL
                        SELECT FROM audit_checkpoints c WHERE c.chain_id = h.chain_id AND c.seq = h.last_seq AND c.hash = h.last_hash)
            OR EXISTS (SELECT FROM audit_events e WHERE e.chain_id = h.chain_id AND e.seq > h.last_seq))
    UNION ALL
    SELECT DISTINCT l.chain_id, 0::bigint, NULL::uuid, 'the chain has no head' FROM linked l
        WHERE NOT EXISTS (SELECT FROM audit_chains c WHERE c.chain_id = l.chain_id)
    UNION ALL
    SELECT 'system', p.seq, p.id, 'the checkpoints of pruned months were changed'
        FROM (SELECT 1) one LEFT JOIN pruned p ON true
        WHERE coalesce(p.digest, encode(sha256(''), 'hex')) <> audit_checkpoints_digest()
    ORDER BY 1, 2
$$
"""
VERIFY = """
CREATE OR REPLACE FUNCTION audit_verify(chain text DEFAULT NULL) RETURNS TABLE (chain_id text, seq bigint, event_id uuid, problem text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$ SELECT * FROM audit_verify_since(NULL, chain) $$
"""

# Of fixed width, and without what the tenant wrote: to erase a job's metadata is to erase them here.
LABEL = """
CREATE OR REPLACE FUNCTION job_label(key text, value text) RETURNS uuid LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT encode(substr(sha256(convert_to(key || E'\\x1f' || value, 'UTF8')), 1, 16), 'hex')::uuid
$$
"""
LABELS_FOLLOW = """
CREATE OR REPLACE FUNCTION job_labels_follow() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        DELETE FROM job_labels l USING jsonb_each_text(OLD.metadata) m
            WHERE l.tenant_id = OLD.tenant_id AND l.label = job_label(m.key, m.value) AND l.job_id = OLD.id;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO job_labels (tenant_id, label, job_id)
            SELECT NEW.tenant_id, job_label(m.key, m.value), NEW.id FROM jsonb_each_text(NEW.metadata) m
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$
"""
LABEL_TRIGGERS = (
    """CREATE OR REPLACE TRIGGER job_labels_added AFTER INSERT ON jobs FOR EACH ROW WHEN (NEW.metadata IS NOT NULL)
       EXECUTE FUNCTION job_labels_follow()""",
    """CREATE OR REPLACE TRIGGER job_labels_changed AFTER UPDATE OF metadata ON jobs FOR EACH ROW
       WHEN (NEW.metadata IS DISTINCT FROM OLD.metadata) EXECUTE FUNCTION job_labels_follow()""",
    """CREATE OR REPLACE TRIGGER job_labels_removed AFTER DELETE ON jobs FOR EACH ROW WHEN (OLD.metadata IS NOT NULL)
       EXECUTE FUNCTION job_labels_follow()""",
)

# Every label is a list of jobs in order of their ids, and so is every state: each list in turn is asked for its newest job that is not
# above `place`, until all name the same one. `_probes` bounds the work, whatever the lists are like; where that ends it, the last row says
# where to go on: below its id (false), or at it (null).
JOBS_WITH_LABELS = """
CREATE FUNCTION jobs_with_labels(_tenant_id uuid, _labels jsonb, _state text, _since uuid, _before uuid, _limit integer, _probes integer)
RETURNS TABLE (job_id uuid, is_found boolean) LANGUAGE plpgsql STABLE AS $$
DECLARE
    labels uuid[] := ARRAY(SELECT job_label(m.key, m.value) FROM jsonb_each_text(_labels) m);
    lists integer := cardinality(labels) + CASE WHEN _state IS NULL THEN 0 ELSE 1 END;
    list integer := 0;
    place uuid := _before;
    agreed integer := 0;  -- lists that name `place`; with none, it is out already
    newest uuid;
BEGIN
    FOR probe IN 1.._probes LOOP
        IF list < cardinality(labels) THEN
            SELECT l.job_id INTO newest FROM job_labels l
                WHERE l.tenant_id = _tenant_id AND l.label = labels[list + 1] AND l.job_id >= _since AND l.job_id <= place
                      AND (agreed > 0 OR l.job_id < place)
                ORDER BY l.job_id DESC LIMIT 1;
        ELSE  -- by the tenant's own index, whatever the planner believes: see models/listing.py
            SELECT j.id INTO newest FROM jobs j
                WHERE j.tenant_id = ANY (ARRAY[_tenant_id]) AND (j.state, j.id) >= (_state, _since) AND (j.state, j.id) <= (_state, place)
                      AND (agreed > 0 OR j.id < place)
                ORDER BY j.tenant_id DESC, j.state DESC, j.id DESC LIMIT 1;
        END IF;
        IF newest IS NULL THEN
            RETURN;
        END IF;
        agreed := CASE WHEN newest = place THEN agreed + 1 ELSE 1 END;
        place := newest;
        list := (list + 1) % lists;
        IF agreed = lists THEN
            agreed := 0;
            IF EXISTS (SELECT FROM jobs j WHERE j.id = place AND j.metadata @> _labels) THEN
                RETURN QUERY SELECT place, true;
                _limit := _limit - 1;
                IF _limit = 0 THEN
                    RETURN;
                END IF;
            END IF;
        END IF;
    END LOOP;
    RETURN QUERY SELECT place, CASE WHEN agreed = 0 THEN false END;
END $$
"""
FUNCTIONS = (
    "jobs_with_labels(uuid, jsonb, text, uuid, uuid, integer, integer)",
    "job_label(text, text)",
    "audit_verify_since(timestamptz, text)",
    "audit_prune_month(date, text, jsonb)",
    "audit_checkpoints_digest()",
    "audit_partitions_ahead()",
)


def upgrade() -> None:
    for name, (table, column) in INDEXES.items():
        online.create_index(name, table, [column], where=f"{column} IS NOT NULL")
    _add_labels()
    op.create_table(
        "audit_checkpoints",
        sa.Column("chain_id", sa.Text(), nullable=False),
        sa.Column("seq", sa.BigInteger(), nullable=False),
        sa.Column("hash", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("chain_id", "seq"),
    )
    for statement in (PARTITIONS, PARTITIONS_AHEAD, CHECKPOINTS_DIGEST, PRUNE_MONTH, VERIFY_SINCE, VERIFY, JOBS_WITH_LABELS):
        op.execute(statement)
    op.execute("REVOKE EXECUTE ON FUNCTION audit_prune_month(date, text, jsonb), audit_verify_since(timestamptz, text) FROM PUBLIC")
    op.execute("GRANT EXECUTE ON FUNCTION audit_verify_since(timestamptz, text) TO darkroom_app, darkroom_auditor")
    op.execute("GRANT SELECT ON job_labels TO darkroom_app")
    op.execute(f"SELECT audit_ensure_partitions({MONTHS_AHEAD})")


def downgrade() -> None:
    """As 0005 left it, but for months that were pruned: `audit_verify` of before finds their events missing."""
    from importlib import import_module

    first = import_module("migrations.versions.0001_audit_log")
    for name in ("added", "changed", "removed"):
        op.execute(f"DROP TRIGGER job_labels_{name} ON jobs")
    op.execute("DROP FUNCTION job_labels_follow()")
    for statement in (first.PARTITIONS, first.VERIFY):
        op.execute(statement.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION", 1))
    for function in FUNCTIONS:
        op.execute(f"DROP FUNCTION {function}")
    op.drop_table("audit_checkpoints")
    op.drop_table("job_labels")
    op.create_index("jobs_by_metadata", "jobs", ["metadata"], postgresql_using="gin", postgresql_where=sa.text("metadata IS NOT NULL"))
    for name, (table, _) in INDEXES.items():
        op.drop_index(name, table)


def _add_labels() -> None:
    """The lists, kept by triggers from now on, and filled for the jobs that are there: a few at a time, while others write."""
    with op.get_context().autocommit_block():
        op.create_table(
            "job_labels",
            sa.Column("tenant_id", sa.Uuid(), nullable=False),
            sa.Column("label", sa.Uuid(), nullable=False),
            sa.Column("job_id", sa.Uuid(), nullable=False),
            sa.PrimaryKeyConstraint("tenant_id", "label", "job_id"),
            if_not_exists=True,
        )
        for statement in (LABEL, LABELS_FOLLOW, *LABEL_TRIGGERS):
            op.execute(statement)
    online.run_in_pieces(
        "jobs",
        """INSERT INTO job_labels (tenant_id, label, job_id)
           SELECT j.tenant_id, job_label(m.key, m.value), j.id FROM jobs j, jsonb_each_text(j.metadata) m
           WHERE j.metadata IS NOT NULL AND j.id > :after AND j.id <= :upto ON CONFLICT DO NOTHING""",
    )
    online.drop_index("jobs_by_metadata")
