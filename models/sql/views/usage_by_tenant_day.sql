-- One row per tenant and UTC day: megapixel-steps reserved by jobs under way, settled for stored
-- images, and abandoned, which were done on images of canceled jobs that were never stored; and
-- money, for the stored ones. Quotas count all three.
CREATE OR REPLACE VIEW usage_by_tenant_day AS
SELECT u.day, t.name AS tenant, u.jobs_accepted, u.jobs_succeeded,
       u.reserved AS reserved_megapixel_steps, u.settled AS settled_megapixel_steps, u.cost,
       u.abandoned AS abandoned_megapixel_steps
FROM usage_ledger u JOIN tenants t ON t.id = u.tenant_id
