-- Keep the sums of what a tenant has queued in a pool and tier, as jobs come and go.
--
-- Row by row and in the same transaction: the sums are exact, and nobody has to count a backlog of
-- a million rows.
CREATE OR REPLACE FUNCTION flows_count_queued() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE sign integer := CASE WHEN NEW.state = 'queued' THEN 1 ELSE -1 END;
BEGIN
    INSERT INTO flows AS f (pool, tier, tenant_id, queued_jobs, queued_images, queued_s)
        VALUES (NEW.pool, NEW.tier, NEW.tenant_id,
                sign, sign * NEW.num_images, sign * NEW.predicted_s)
        ON CONFLICT (pool, tier, tenant_id) DO UPDATE SET
            queued_jobs = f.queued_jobs + sign,
            queued_images = f.queued_images + sign * NEW.num_images,
            -- An empty flow has nothing queued, whatever a million additions have left.
            queued_s = CASE WHEN f.queued_jobs + sign = 0 THEN 0
                            ELSE greatest(0, f.queued_s + sign * NEW.predicted_s) END;
    RETURN NULL;
END $$
