-- List what is wrong with the audit log's events from an instant on: changed, missing, unlinked.
--
-- since: events before it are looked at where one of these links to them, and not otherwise; NULL
-- looks at all. chain: of this one alone. An unharmed log gives no row.
CREATE OR REPLACE FUNCTION audit_verify_since(since timestamptz, chain text DEFAULT NULL)
RETURNS TABLE (chain_id text, seq bigint, event_id uuid, problem text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    WITH linked AS (
        SELECT known.*, lag(known.seq) OVER w AS before_seq, lag(known.hash) OVER w AS before_hash
        FROM (
            SELECT e.chain_id, e.seq, e.hash, e.prev_hash, e.id, e.at, e.event, e.actor, e.job_id,
                   e.attempt, e.facts, true AS is_event
            FROM audit_events e
            WHERE (chain IS NULL OR e.chain_id = chain) AND (since IS NULL OR e.at >= since)
            UNION ALL
            SELECT c.chain_id, c.seq, c.hash, NULL, NULL, '-infinity', NULL, NULL, NULL, NULL, NULL,
                   false
            FROM audit_checkpoints c WHERE chain IS NULL OR c.chain_id = chain
        ) known
        WINDOW w AS (PARTITION BY known.chain_id ORDER BY known.seq, known.at)
    ), events AS (
        SELECT l.*, l.seq = coalesce(l.before_seq, 0) + 1 AS follows FROM linked l WHERE l.is_event
    ), before AS MATERIALIZED (
        SELECT e.chain_id, e.seq, p.hash
        FROM events e JOIN audit_events p ON p.chain_id = e.chain_id AND p.seq = e.seq - 1
        WHERE since IS NOT NULL AND NOT e.follows AND p.at < since
    ), pruned AS (
        SELECT e.seq, e.id, e.facts ->> 'checkpoints_sha256' AS digest FROM audit_events e
        WHERE e.chain_id = 'system' AND e.event = 'audit:month:pruned' ORDER BY e.seq DESC LIMIT 1
    )
    SELECT e.chain_id, e.seq, e.id, 'the event was changed: its hash does not fit its content'
        FROM events e
        WHERE e.hash <> audit_digest(e.prev_hash, e.chain_id, e.seq, e.id, e.at, e.event, e.actor,
                                     e.job_id, e.attempt, e.facts)
    UNION ALL
    SELECT e.chain_id, e.seq, e.id, 'events are missing before this one' FROM events e
        WHERE NOT e.follows
              AND NOT EXISTS (SELECT FROM before b WHERE b.chain_id = e.chain_id AND b.seq = e.seq)
    UNION ALL
    SELECT e.chain_id, e.seq, e.id, 'the link to the event before is broken' FROM events e
        WHERE e.follows AND e.prev_hash <> coalesce(e.before_hash, ''::bytea)
    UNION ALL
    SELECT e.chain_id, e.seq, e.id, 'the link to the event before is broken'
        FROM events e JOIN before b USING (chain_id, seq)
        WHERE e.prev_hash <> b.hash
    UNION ALL
    SELECT h.chain_id, h.last_seq, NULL::uuid, 'the newest events are missing' FROM audit_chains h
        WHERE (chain IS NULL OR h.chain_id = chain) AND h.last_seq > 0 AND (
            NOT EXISTS (
                SELECT FROM audit_events e
                WHERE e.chain_id = h.chain_id AND e.seq = h.last_seq AND e.hash = h.last_hash
                UNION ALL
                SELECT FROM audit_checkpoints c
                WHERE c.chain_id = h.chain_id AND c.seq = h.last_seq AND c.hash = h.last_hash)
            OR EXISTS (SELECT FROM audit_events e
                       WHERE e.chain_id = h.chain_id AND e.seq > h.last_seq))
    UNION ALL
    SELECT DISTINCT l.chain_id, 0::bigint, NULL::uuid, 'the chain has no head' FROM linked l
        WHERE NOT EXISTS (SELECT FROM audit_chains c WHERE c.chain_id = l.chain_id)
    UNION ALL
    SELECT 'system', p.seq, p.id, 'the checkpoints of pruned months were changed'
        FROM (SELECT 1) one LEFT JOIN pruned p ON true
        WHERE coalesce(p.digest, encode(sha256(''), 'hex')) <> audit_checkpoints_digest()
    ORDER BY 1, 2
$$
