-- List everything that is wrong with the audit log, or with one chain of it.
CREATE OR REPLACE FUNCTION audit_verify(chain text DEFAULT NULL)
RETURNS TABLE (chain_id text, seq bigint, event_id uuid, problem text)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = public, pg_temp AS $$
    SELECT * FROM audit_verify_since(NULL, chain)
$$
