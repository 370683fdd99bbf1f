-- Say the label of an entry of a job's metadata: what jobs with the same entry are listed under.
--
-- Of fixed width, and without what the tenant wrote: to erase a job's metadata is to erase them
-- here.
CREATE OR REPLACE FUNCTION job_label(key text, value text) RETURNS uuid
LANGUAGE sql IMMUTABLE PARALLEL SAFE AS $$
    SELECT encode(substr(sha256(convert_to(key || E'\x1f' || value, 'UTF8')), 1, 16), 'hex')::uuid
$$
