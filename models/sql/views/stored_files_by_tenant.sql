-- One row per tenant: the pictures that it brought and did not erase, their bytes, and what of its
-- limit they are.
CREATE OR REPLACE VIEW stored_files_by_tenant AS
SELECT t.name AS tenant, coalesce(s.files, 0) AS files, coalesce(s.size_bytes, 0) AS size_bytes,
       t.max_stored_bytes,
       round(s.size_bytes::numeric / nullif(t.max_stored_bytes, 0), 4) AS used_ratio
FROM tenants t LEFT JOIN stored_files s ON s.tenant_id = t.id
