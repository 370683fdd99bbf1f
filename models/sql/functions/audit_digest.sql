-- Say the hash of an audit event: over its content, its place in its chain and the hash before it.
--
-- `at` as whole microseconds, for text forms of instants depend on settings. What is hashed here is
-- hashed in every log that there is: another order or form breaks them all.
CREATE OR REPLACE FUNCTION audit_digest(
    prev_hash bytea, chain_id text, seq bigint, id uuid, at timestamptz, event text, actor text,
    job_id uuid, attempt integer, facts jsonb
) RETURNS bytea LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT sha256(convert_to(jsonb_build_array(
        encode(prev_hash, 'hex'), chain_id, seq, id, (extract(epoch FROM at) * 1000000)::bigint,
        event, actor, job_id, attempt, facts)::text, 'UTF8'))
$$
