-- One row per job: what was asked, where the time went, what it cost. Newest first by accepted_at.
CREATE OR REPLACE VIEW job_history AS
SELECT j.id AS job_id, t.name AS tenant, j.state, j.tier, j.pool, j.model, j.model_version,
       j.prompt, j.negative_prompt, j.width_px || 'x' || j.height_px AS size, j.num_steps,
       j.guidance, j.sampler, j.seed, j.num_images, j.output_format, j.precision, j.determinism,
       j.bucket_rows, j.accepted_at, j.started_at, j.rendered_at, j.finished_at,
       round(extract(epoch FROM j.started_at - j.accepted_at), 3) AS queue_s,
       round(extract(epoch FROM j.rendered_at - j.started_at), 3) AS render_s,
       round(extract(epoch FROM j.finished_at - j.rendered_at), 3) AS store_s,
       round(extract(epoch FROM j.finished_at - j.accepted_at), 3) AS total_s,
       j.attempt AS attempts, j.worker, a.device, coalesce(a.max_images, 0) AS max_batch_images,
       coalesce(a.max_rows, 0) AS max_batch_rows, coalesce(a.steps, 0) AS steps_run,
       coalesce(a.shared_steps, 0) AS steps_shared,
       round(j.device_seconds::numeric, 4) AS gpu_seconds, j.cost, j.currency, j.failure_code,
       j.failure_detail, i.stored AS images_stored,
       CASE WHEN j.state IN ('canceled', 'rejected') THEN i.steps_unstored ELSE 0 END
           AS steps_abandoned,
       j.model_alias, j.init_file_id, j.mask_file_id, j.control_file_id, j.strength, j.adapters,
       j.metadata, j.clip_skip, j.fleet_revision, j.prompt_tokens, j.truncated_tokens,
       j.request_id, j.traceparent, i.suspect AS images_suspect
FROM jobs j
JOIN tenants t ON t.id = j.tenant_id
LEFT JOIN LATERAL (
    SELECT max(device) AS device, max(max_images) AS max_images, max(max_rows) AS max_rows,
           sum(steps) AS steps, sum(shared_steps) AS shared_steps
    FROM attempts WHERE attempts.job_id = j.id
) a ON true
LEFT JOIN LATERAL (
    SELECT count(*) FILTER (WHERE i.state = 'stored') AS stored,
           count(*) FILTER (WHERE i.suspect IS NOT NULL) AS suspect,
           coalesce(
               sum(least(i.steps_done, coalesce(j.steps_per_image, j.num_steps)))
                   FILTER (WHERE i.state <> 'stored'), 0) AS steps_unstored
    FROM images i WHERE i.job_id = j.id
) i ON true
