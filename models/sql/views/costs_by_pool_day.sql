-- Per UTC day and pool: what its devices cost, the images stored from it, and the cost of one, with
-- all idle, lost and starting time. floor_per_image: at full use, without waste.
CREATE OR REPLACE VIEW costs_by_pool_day AS
WITH billed AS (
    SELECT (hour AT TIME ZONE 'UTC')::date AS day, pool, sum(billed_s) AS billed_s,
           sum(idle_s) AS idle_s, sum(startup_s) AS startup_s, sum(padding_s) AS padding_s,
           sum(host_s) AS host_s, sum(encode_s + denoise_s + decode_s) AS busy_s,
           sum(cost) AS cost
    FROM device_time_by_hour GROUP BY day, pool
), stored AS (
    SELECT (a.created_at AT TIME ZONE 'UTC')::date AS day, j.pool, count(*) AS images,
           sum(i.device_seconds) AS seconds, sum(coalesce(i.device_cost, 0)) AS cost
    FROM artifacts a
    JOIN images i ON i.artifact_id = a.id
    JOIN jobs j ON j.id = a.job_id
    GROUP BY day, j.pool
), wasted AS (
    SELECT day, pool, sum(gpu_seconds) AS seconds FROM wasted_time_by_day GROUP BY day, pool
)
SELECT day, pool, b.billed_s, b.busy_s, b.padding_s, b.host_s, b.startup_s, b.idle_s,
       round(coalesce(s.seconds, 0)::numeric, 3) AS stored_s,
       coalesce(w.seconds, 0) AS wasted_s,
       round((b.busy_s + b.padding_s - coalesce(s.seconds, 0) - coalesce(w.seconds, 0))::numeric, 3)
           AS unexplained_s,
       coalesce(s.images, 0) AS images, b.cost,
       round(b.cost / s.images, 6) AS cost_per_image,
       round(s.cost / s.images, 6) AS floor_per_image
FROM billed b
FULL JOIN stored s USING (day, pool)
FULL JOIN wasted w USING (day, pool)
