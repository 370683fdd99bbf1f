-- One row per audit chain: how many events it has and its head. Check it with:
-- SELECT * FROM audit_verify().
CREATE OR REPLACE VIEW audit_chain_status AS
SELECT coalesce(t.name, c.chain_id) AS chain, c.chain_id, c.last_seq AS events,
       encode(c.last_hash, 'hex') AS head
FROM audit_chains c LEFT JOIN tenants t ON t.id::text = c.chain_id
