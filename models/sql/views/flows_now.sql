-- One row per tenant with queued jobs in a pool and tier: how much, and its weight in fair order.
CREATE OR REPLACE VIEW flows_now AS
SELECT f.pool, f.tier, t.name AS tenant, t.weight, f.queued_jobs, f.queued_images,
       round(f.queued_s::numeric, 1) AS queued_gpu_s,
       round((f.finish_tag - c.virtual_s)::numeric, 1) AS ahead_s
FROM flows f
JOIN tenants t ON t.id = f.tenant_id
LEFT JOIN fair_clocks c USING (pool, tier)
WHERE f.queued_jobs > 0
