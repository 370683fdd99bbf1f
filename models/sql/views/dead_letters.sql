-- One row per failed job: why, after how many tries, on which workers. To try one
-- again: darkroom requeue JOB.
CREATE OR REPLACE VIEW dead_letters AS
SELECT j.id AS job_id, t.name AS tenant, j.pool, j.tier, j.model, j.failure_code,
       j.failure_detail AS last_error, j.attempt AS attempts, j.counted_attempts, a.workers,
       a.outcomes, j.accepted_at, j.finished_at, r.id AS requeued_as
FROM jobs j
JOIN tenants t ON t.id = j.tenant_id
LEFT JOIN jobs r ON r.requeue_of = j.id
LEFT JOIN LATERAL (
    SELECT string_agg(DISTINCT worker, ' ' ORDER BY worker) AS workers,
           string_agg(outcome, ' ' ORDER BY attempt) AS outcomes
    FROM attempts WHERE attempts.job_id = j.id
) a ON true
WHERE j.state = 'failed'
