-- Keep job_labels, the lists of jobs by their metadata, as jobs are written, changed and removed.
CREATE OR REPLACE FUNCTION job_labels_follow() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        DELETE FROM job_labels l USING jsonb_each_text(OLD.metadata) m
            WHERE l.tenant_id = OLD.tenant_id AND l.label = job_label(m.key, m.value)
                  AND l.job_id = OLD.id;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO job_labels (tenant_id, label, job_id)
            SELECT NEW.tenant_id, job_label(m.key, m.value), NEW.id
            FROM jsonb_each_text(NEW.metadata) m
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$
