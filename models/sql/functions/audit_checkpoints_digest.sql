-- Say the digest of all checkpoints: the events that stand in place of months that were pruned.
--
-- Later events link to them: there is one of each chain that had any, as a rule.
CREATE OR REPLACE FUNCTION audit_checkpoints_digest() RETURNS text
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT encode(sha256(convert_to(coalesce(string_agg(
        concat_ws(' ', chain_id, seq, encode(hash, 'hex')), E'\n' ORDER BY chain_id COLLATE "C", seq
    ), ''), 'UTF8')), 'hex')
    FROM audit_checkpoints
$$
