-- One row per pool and tier with unfinished jobs: how many wait, run and are being stored, and how
-- long the oldest has waited.
--
-- Reads the flows' sums and the rows in hand, which are bounded; never the backlog.
CREATE OR REPLACE VIEW queue_now AS
WITH queued AS (
    SELECT pool, tier, sum(queued_jobs)::bigint AS jobs, sum(queued_images)::bigint AS images
    FROM flows WHERE queued_jobs > 0 GROUP BY pool, tier
), announced AS (
    SELECT pool, tier, count(*) AS jobs FROM jobs
    WHERE state = 'queued' AND announced_at IS NOT NULL GROUP BY pool, tier
), running AS (
    SELECT pool, tier, count(*) AS jobs, sum(num_images) AS images FROM jobs
    WHERE state = 'running' GROUP BY pool, tier
), storing AS (
    SELECT pool, tier, count(*) AS jobs, sum(num_images) AS images FROM jobs
    WHERE state = 'storing' GROUP BY pool, tier
), places AS (
    SELECT pool, tier FROM queued
    UNION SELECT pool, tier FROM running
    UNION SELECT pool, tier FROM storing
)
SELECT p.pool, p.tier,
       coalesce(queued.jobs, 0) - coalesce(announced.jobs, 0) AS waiting,
       coalesce(announced.jobs, 0) AS announced,
       coalesce(running.jobs, 0) AS running,
       coalesce(storing.jobs, 0) AS storing,
       coalesce(queued.images, 0) + coalesce(running.images, 0) + coalesce(storing.images, 0)
           AS images,
       round(extract(epoch FROM clock_timestamp() - (
           SELECT j.accepted_at FROM jobs j
           WHERE j.pool = p.pool AND j.tier = p.tier AND j.state = 'queued'
           ORDER BY j.accepted_at LIMIT 1)), 1) AS oldest_wait_s,
       (SELECT count(*) FROM workers w
        WHERE w.pool = p.pool AND w.state IN ('ready', 'leaving')
              AND w.seen_at > clock_timestamp() - make_interval(secs => w.silent_after_s))
           AS live_workers
FROM places p
LEFT JOIN queued USING (pool, tier)
LEFT JOIN announced USING (pool, tier)
LEFT JOIN running USING (pool, tier)
LEFT JOIN storing USING (pool, tier)
