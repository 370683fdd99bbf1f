-- One row per audit event, readable: who did what to which job, with its place in the hash chain.
CREATE OR REPLACE VIEW audit_log AS
SELECT e.at, coalesce(t.name, e.chain_id) AS chain, e.seq, e.event, e.actor, e.job_id, e.attempt,
       (SELECT string_agg(f.key || '=' || (f.value #>> '{}'), ' ' ORDER BY f.key)
        FROM jsonb_each(e.facts) f WHERE length(f.value #>> '{}') <= 64) AS facts_text,
       e.facts, e.id AS event_id,
       encode(e.prev_hash, 'hex') AS prev_hash, encode(e.hash, 'hex') AS hash
FROM audit_events e LEFT JOIN tenants t ON t.id::text = e.chain_id
