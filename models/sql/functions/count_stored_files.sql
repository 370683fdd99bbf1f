-- Keep stored_files, the pictures that a tenant has in the store, up to date.
--
-- By trigger, so that no path through the code can be forgotten.
CREATE OR REPLACE FUNCTION count_stored_files() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    _files bigint := (CASE WHEN NEW.erased_at IS NULL THEN 1 ELSE 0 END)
        - (CASE WHEN TG_OP = 'UPDATE' AND OLD.erased_at IS NULL THEN 1 ELSE 0 END);
BEGIN
    IF _files <> 0 THEN
        INSERT INTO stored_files AS s (tenant_id, files, size_bytes)
            VALUES (NEW.tenant_id, _files, _files * NEW.size_bytes)
        ON CONFLICT (tenant_id) DO UPDATE SET
            files = s.files + excluded.files, size_bytes = s.size_bytes + excluded.size_bytes;
    END IF;
    RETURN NULL;
END $$
