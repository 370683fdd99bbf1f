-- Accept a tenant's jobs: rows, images, places in fair order, ledger and audit events in one go.
--
-- What models/accepting.py calls; a function, so that each connection plans it once, where planning
-- takes longer than running. Each element of _jobs names columns of `jobs`, and beside them `place`
-- (in line), `start_within_s`, `announced`, and `event_id` and `facts` of its audit event. A column
-- that it does not name is NULL, or what `defaults` says: also for jobs that code of before a
-- column was added accepts.
--
-- `placed` adds up their cost in virtual seconds within each flow, so that each starts where the
-- one before it ends (models/flows.py). The ledger reads `flow` and the jobs read both: that is the
-- order of the locks. Whatever nobody reads runs last.
CREATE OR REPLACE FUNCTION accept_jobs(
    _jobs jsonb, _tenant_id uuid, _api_key_id uuid, _currency text, _actor text
) RETURNS TABLE (
    id uuid, accepted_at timestamptz, start_by timestamptz, release_tag double precision,
    usage_day date
) LANGUAGE plpgsql AS $$
#variable_conflict use_column
DECLARE
    defaults CONSTANT jsonb := '{
        "state": "queued", "attempt": 0, "counted_attempts": 0, "device_seconds": 0,
        "predicted_s": 0, "megapixel_steps": 0, "is_front": false, "lacks_inputs": false}';
BEGIN RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT item, own.*
        FROM jsonb_array_elements(_jobs) item, jsonb_to_record(defaults || item) AS own (
            place integer, id uuid, event_id uuid, facts jsonb, start_within_s double precision,
            announced boolean, pool text, tier text, predicted_s double precision,
            megapixel_steps numeric(18, 6))
    ), placed AS MATERIALIZED (
        SELECT asked.*, predicted_s / weight AS own_s,
               sum(predicted_s / weight) OVER (PARTITION BY pool, tier ORDER BY place) AS upto_s
        FROM asked, (SELECT weight FROM tenants WHERE id = _tenant_id) tenant
    ), whole AS MATERIALIZED (
        SELECT pool, tier, max(upto_s) AS cost_s, coalesce(
                   (SELECT virtual_s FROM fair_clocks c
                    WHERE c.pool = placed.pool AND c.tier = placed.tier),
                   extract(epoch FROM clock_timestamp())::double precision) AS clock_s
        FROM placed GROUP BY pool, tier
    ), flow AS (
        INSERT INTO flows AS f (pool, tier, tenant_id, finish_tag)
            SELECT pool, tier, _tenant_id, clock_s + cost_s FROM whole ORDER BY pool, tier
        ON CONFLICT (pool, tier, tenant_id) DO UPDATE SET
            finish_tag = greatest(
                excluded.finish_tag,
                f.finish_tag
                    + (SELECT cost_s FROM whole w WHERE (w.pool, w.tier) = (f.pool, f.tier)))
        RETURNING f.pool, f.tier,
                  f.finish_tag - (SELECT cost_s FROM whole w
                                  WHERE (w.pool, w.tier) = (f.pool, f.tier)) AS start_tag
    ), ledger AS (
        INSERT INTO usage_ledger AS u (tenant_id, day, reserved, jobs_accepted)
            SELECT _tenant_id, (clock_timestamp() AT TIME ZONE 'UTC')::date,
                   sum(megapixel_steps), count(*)
            FROM placed JOIN flow USING (pool, tier)
        ON CONFLICT (tenant_id, day) DO UPDATE SET
            reserved = u.reserved + excluded.reserved,
            jobs_accepted = u.jobs_accepted + excluded.jobs_accepted
        RETURNING day
    ), complete AS (
        SELECT jsonb_agg(defaults || item || jsonb_build_object(
                   'tenant_id', _tenant_id, 'api_key_id', _api_key_id, 'currency', _currency,
                   'accepted_at', clock_timestamp(),
                   'start_by', clock_timestamp() + make_interval(secs => start_within_s),
                   'announced_at', CASE WHEN announced THEN clock_timestamp() END,
                   'release_tag', start_tag + upto_s - own_s, 'usage_day', day
               ) ORDER BY place) AS items
        FROM placed JOIN flow USING (pool, tier) CROSS JOIN ledger
    ), job AS (
        INSERT INTO jobs
            SELECT row.* FROM complete, jsonb_populate_recordset(NULL::jobs, items) AS row
        RETURNING id, accepted_at, start_by, release_tag, usage_day, seed, num_images, pool, tier,
                  announced_at
    ), image AS (
        INSERT INTO images (job_id, index, seed)
            SELECT id, index, seed + index FROM job, generate_series(0, num_images - 1) index
    ), clock AS (
        INSERT INTO fair_clocks AS c (pool, tier, virtual_s)
            SELECT pool, tier, max(release_tag) FROM job
            WHERE announced_at IS NOT NULL GROUP BY pool, tier
        ON CONFLICT (pool, tier) DO UPDATE SET
            virtual_s = greatest(c.virtual_s, excluded.virtual_s)
    ), event AS (
        INSERT INTO audit_events (id, chain_id, seq, event, actor, job_id, facts, prev_hash, hash)
            SELECT event_id, _tenant_id::text, 0, 'job:request:accepted', _actor, id, facts, '', ''
            FROM placed JOIN job USING (id) ORDER BY place
    )
    SELECT id, accepted_at, start_by, release_tag, usage_day FROM job;
END $$
