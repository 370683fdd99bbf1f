-- Per UTC day, tenant, tier and model: stored images, the device time that they took and that was
-- wasted beside, what both cost the house, and what the tenant pays. cost_per_image: of the house,
-- waste included.
CREATE OR REPLACE VIEW costs_by_tenant_day AS
WITH stored AS (
    SELECT (a.created_at AT TIME ZONE 'UTC')::date AS day, t.name AS tenant, j.tier, j.model,
           count(*) AS images, sum(i.device_seconds) AS seconds, sum(i.padding_s) AS padding_s,
           sum(coalesce(i.device_cost, 0)) AS device_cost,
           sum(j.cost * coalesce(
               (i.device_seconds / nullif(j.device_seconds, 0))::numeric, 0)) AS charged
    FROM artifacts a
    JOIN images i ON i.artifact_id = a.id
    JOIN jobs j ON j.id = a.job_id
    JOIN tenants t ON t.id = a.tenant_id
    GROUP BY day, t.name, j.tier, j.model
), wasted AS (
    SELECT day, tenant, tier, model, sum(gpu_seconds) AS seconds, sum(cost) AS cost
    FROM wasted_time_by_day GROUP BY day, tenant, tier, model
)
SELECT day, tenant, tier, model, coalesce(s.images, 0) AS images,
       round(coalesce(s.seconds, 0)::numeric, 3) AS gpu_seconds,
       round(coalesce(s.padding_s, 0)::numeric, 3) AS padding_s,
       coalesce(w.seconds, 0) AS wasted_s,
       round(coalesce(s.device_cost, 0), 6) AS device_cost,
       coalesce(w.cost, 0) AS wasted_cost,
       round((coalesce(s.device_cost, 0) + coalesce(w.cost, 0)) / s.images, 6) AS cost_per_image,
       round(coalesce(s.charged, 0), 6) AS charged
FROM stored s FULL JOIN wasted w USING (day, tenant, tier, model)
