-- Remove a month of the audit log and keep what later events link to; the owner's alone.
--
-- A month is over for a day before it may go: by then nobody still writes into it. The digest of
-- all checkpoints goes into the chain `system`, or whoever can write the table could pass off a
-- hole in the log as something that was pruned.
CREATE OR REPLACE FUNCTION audit_prune_month(
    month date, actor text, more_facts jsonb DEFAULT '{}'
) RETURNS bigint
LANGUAGE plpgsql SET search_path = public, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE name text := 'audit_events_' || to_char(month, 'YYYY_MM'); events bigint; facts jsonb;
BEGIN
    IF date_trunc('month', month::timestamp) + interval '1 month' + interval '1 day'
            > now() AT TIME ZONE 'UTC' THEN
        RAISE EXCEPTION 'the month % is not over', to_char(month, 'YYYY-MM')
            USING ERRCODE = 'invalid_parameter_value';
    END IF;
    EXECUTE format('SELECT count(*) FROM %I', name) INTO events;
    EXECUTE format($sql$
        INSERT INTO audit_checkpoints (chain_id, seq, hash)
            SELECT e.chain_id, e.seq, e.hash FROM (
                SELECT chain_id, seq, hash,
                       lead(seq) OVER (PARTITION BY chain_id ORDER BY seq) AS next_seq
                FROM %1$I
            ) e
            WHERE e.next_seq IS DISTINCT FROM e.seq + 1 AND (
                EXISTS (SELECT FROM audit_events n
                        WHERE n.chain_id = e.chain_id AND n.seq = e.seq + 1)
                OR EXISTS (SELECT FROM audit_chains c
                           WHERE c.chain_id = e.chain_id AND c.last_seq = e.seq))
        ON CONFLICT (chain_id, seq) DO NOTHING
    $sql$, name);
    EXECUTE format('DELETE FROM audit_checkpoints c USING %I e
                    WHERE e.chain_id = c.chain_id AND e.seq = c.seq + 1', name);
    -- Before the chain's head, as whoever appends does.
    LOCK TABLE audit_events IN ACCESS EXCLUSIVE MODE;
    facts := more_facts || jsonb_build_object(
        'month', to_char(month, 'YYYY-MM'), 'events', events,
        'checkpoints_sha256', audit_checkpoints_digest());
    INSERT INTO audit_events (id, chain_id, seq, event, actor, facts, prev_hash, hash)
        VALUES (gen_random_uuid(), 'system', 0, 'audit:month:pruned', actor, facts, '', '');
    EXECUTE format('ALTER TABLE audit_events DETACH PARTITION %I', name);
    EXECUTE format('DROP TABLE %I', name);
    RETURN events;
END $$
