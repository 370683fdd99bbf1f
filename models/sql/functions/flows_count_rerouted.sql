-- Keep the sums of what a tenant has queued as a queued job changes its pool.
--
-- Both sums in the order of the pools' names: the order of locks of models/__init__.py.
CREATE OR REPLACE FUNCTION flows_count_rerouted() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO flows AS f (pool, tier, tenant_id, queued_jobs, queued_images, queued_s)
        SELECT way.pool, NEW.tier, NEW.tenant_id,
               sign, sign * NEW.num_images, sign * NEW.predicted_s
        FROM (VALUES (OLD.pool, -1), (NEW.pool, 1)) AS way (pool, sign) ORDER BY way.pool
        ON CONFLICT (pool, tier, tenant_id) DO UPDATE SET
            queued_jobs = f.queued_jobs + excluded.queued_jobs,
            queued_images = f.queued_images + excluded.queued_images,
            queued_s = CASE WHEN f.queued_jobs + excluded.queued_jobs = 0 THEN 0
                            ELSE greatest(0, f.queued_s + excluded.queued_s) END;
    RETURN NULL;
END $$
