-- Device time that bought no image, per UTC day on which the attempt ended, tenant, pool, tier,
-- model and class of waste, with its cost at the price of the workers. Of a job that has ended, all
-- time that its stored images do not account for is waste; its attempts that ended badly share that
-- by their time, and the rest is of images that were rendered and are not stored.
CREATE OR REPLACE VIEW wasted_time_by_day AS
WITH spent AS (
    SELECT a.job_id, a.ended_at, a.waste_class, a.gpu_hour_price,
           a.device_seconds + a.unfinished_s AS seconds,
           sum(a.device_seconds + a.unfinished_s) OVER (PARTITION BY a.job_id) AS of_job,
           sum(a.device_seconds + a.unfinished_s) FILTER (WHERE a.waste_class IS NOT NULL)
               OVER (PARTITION BY a.job_id) AS of_bad,
           row_number() OVER (PARTITION BY a.job_id ORDER BY a.attempt DESC) AS from_last
    FROM attempts a WHERE a.ended_at IS NOT NULL
), wasted AS (
    SELECT s.*, j.tenant_id, j.pool, j.tier, j.model, j.state,
           greatest(0, s.of_job - i.bought) AS of_waste
    FROM spent s
    JOIN jobs j ON j.id = s.job_id
    CROSS JOIN LATERAL (
        SELECT coalesce(sum(i.device_seconds), 0) AS bought FROM images i
        WHERE i.job_id = s.job_id AND (i.state = 'stored' OR j.finished_at IS NULL)
    ) i
), parts AS (
    SELECT ended_at, tenant_id, pool, tier, model, gpu_hour_price, waste_class,
           seconds * least(1, of_waste / nullif(of_bad, 0)) AS wasted_s
    FROM wasted WHERE waste_class IS NOT NULL
    UNION ALL
    SELECT ended_at, tenant_id, pool, tier, model, gpu_hour_price,
           CASE state WHEN 'canceled' THEN 'canceled' ELSE 'not_stored' END,
           of_waste - coalesce(of_bad, 0)
    FROM wasted WHERE from_last = 1
)
SELECT (p.ended_at AT TIME ZONE 'UTC')::date AS day, t.name AS tenant, p.pool, p.tier, p.model,
       p.waste_class, round(sum(p.wasted_s)::numeric, 3) AS gpu_seconds,
       round(sum(p.wasted_s * p.gpu_hour_price / 3600)::numeric, 6) AS cost
FROM parts p JOIN tenants t ON t.id = p.tenant_id
WHERE p.wasted_s > 0.0005
GROUP BY day, t.name, p.pool, p.tier, p.model, p.waste_class
