"""The SQL that makes a queue of any length.

Ids are UUIDv7 of accept times spread over six hours. Of ten jobs six are the first tenant's, in a
tier that changes with every ten; the others' go round 49 tenants, each of whom has one tier. The
tag of a job is its place in its flow, in predicted device seconds.
"""

LOAD = """
    INSERT INTO jobs (
        id, tenant_id, pool, tier, model, model_version, prompt, negative_prompt, width_px,
        height_px, num_steps, guidance, sampler, seed, num_images, output_format, precision,
        determinism, release_tag, predicted_s, eta_raw_s, accepted_at, start_by, run_within_s,
        currency
    )
    SELECT
        (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0')
            || '7' || substr(noise, 1, 3) || '8' || substr(noise, 4, 15))::uuid,
        (CAST(:tenants AS uuid[]))[tenant + 1], :pool, (CAST(:tiers AS text[]))[tier + 1],
        'pocket', '1', 'a large red circle in the center on a blue background, number ' || i, '',
        128, 128, 20, 1.5, 'ddim', i, 1, 'png', 'fp32', 'best_effort',
        :now_s + place * 0.5, 0.5, 10, at, now() + interval '1 day', 600, 'USD'
    FROM (
        SELECT
            i,
            md5(i::text) AS noise,
            to_timestamp(:now_s - 21600 * (1 - i::float8 / (:over + :rows))) AS at,
            CASE WHEN is_bulk THEN 0 ELSE 1 + light % :light_tenants END AS tenant,
            CASE WHEN is_bulk THEN (i / 10) % 3 ELSE (1 + light % :light_tenants) % 3 END AS tier,
            CASE WHEN is_bulk THEN (i / 30) * 6 + i % 10 ELSE light / :light_tenants END AS place
        FROM (
            SELECT i, i % 10 < 6 AS is_bulk, (i / 10) * 4 + i % 10 - 6 AS light
            FROM generate_series(0, :over + :rows - 1) i
        ) numbered
    ) placed ORDER BY i
"""
LEAVE = """
    UPDATE jobs
    SET state = 'succeeded', started_at = accepted_at, finished_at = now() - interval '2 hours'
    WHERE seed < :over
"""
IMAGES = "INSERT INTO images (job_id, index, seed) SELECT id, 0, seed FROM jobs"
RUN = """
    UPDATE jobs SET
        state = 'running', worker = :worker, attempt = 1, announced_at = now(),
        started_at = now(), lease_expires_at = now() + interval '1 day',
        run_by = now() + interval '1 day'
    WHERE id IN (
        (SELECT id FROM jobs WHERE state = 'queued' AND tier = :tier AND tenant_id = :bulk
         ORDER BY release_tag LIMIT :running - 16)
        UNION ALL
        (SELECT id FROM jobs WHERE state = 'queued' AND tier = :tier AND tenant_id <> :bulk
         ORDER BY release_tag, id LIMIT 16)
    )
"""
REJECT = """
    UPDATE jobs SET state = 'rejected', failure_code = 'unsupported', finished_at = now()
    WHERE id IN (
        SELECT id FROM jobs WHERE state = 'queued' AND tenant_id = :bulk AND tier = 'fast'
        ORDER BY seed LIMIT 5
    )
"""
COUNT_FLOWS = """
    INSERT INTO flows (
        pool, tier, tenant_id, finish_tag, queued_jobs, queued_images, queued_s
    )
    SELECT pool, tier, tenant_id, max(release_tag) + 0.5, count(*), sum(num_images),
           sum(predicted_s)
    FROM jobs WHERE state = 'queued' GROUP BY 1, 2, 3
"""
START_CLOCKS = """
    INSERT INTO fair_clocks (pool, tier, virtual_s)
    SELECT pool, tier, min(release_tag) FROM jobs WHERE state = 'queued' GROUP BY 1, 2
"""
BEAT = """
    INSERT INTO workers (name, pool, device, slots, seen_at, facts)
    VALUES (:worker, :pool, 'cpu', :slots, now() + interval '1 day', '{}')
"""
MISCOUNTED = """
    SELECT count(*) FROM flows FULL JOIN (
        SELECT pool, tier, tenant_id, count(*) AS jobs FROM jobs WHERE state = 'queued'
        GROUP BY 1, 2, 3
    ) counted USING (pool, tier, tenant_id)
    WHERE coalesce(queued_jobs, 0) <> coalesce(jobs, 0)
"""
