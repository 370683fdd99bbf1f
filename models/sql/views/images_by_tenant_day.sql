-- Stored images per tenant, UTC day, tier and model, with bytes, GPU-seconds and cost. A job's cost is shared out by
-- device time, and where none was measured, evenly.
CREATE OR REPLACE VIEW images_by_tenant_day AS
SELECT t.name AS tenant, (a.created_at AT TIME ZONE 'UTC')::date AS day, j.tier, j.model,
       count(*) AS images, sum(a.size_bytes) AS size_bytes,
       round(sum(i.device_seconds)::numeric, 3) AS gpu_seconds,
       round(sum(j.cost * coalesce(
           (i.device_seconds / nullif(j.device_seconds, 0))::numeric,
           1.0 / (SELECT count(*) FROM artifacts s WHERE s.job_id = j.id)
       )), 6) AS cost,
       j.currency
FROM artifacts a
JOIN images i ON i.artifact_id = a.id
JOIN jobs j ON j.id = a.job_id
JOIN tenants t ON t.id = a.tenant_id
GROUP BY t.name, day, j.tier, j.model, j.currency
