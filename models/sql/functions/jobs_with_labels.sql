-- Find a tenant's newest jobs that have all of these entries of metadata, with bounded work.
--
-- Every label is a list of jobs in order of their ids, and so is every state: each list in turn is
-- asked for its newest job that is not above `place`, until all name the same one. `_probes` bounds
-- the work, whatever the lists are like; where that ends it, the last row says where to go on:
-- below its id (false), or at it (null).
CREATE OR REPLACE FUNCTION jobs_with_labels(
    _tenant_id uuid, _labels jsonb, _state text, _since uuid, _before uuid, _limit integer,
    _probes integer
) RETURNS TABLE (job_id uuid, is_found boolean) LANGUAGE plpgsql STABLE AS $$
DECLARE
    labels uuid[] := ARRAY(SELECT job_label(m.key, m.value) FROM jsonb_each_text(_labels) m);
    lists integer := cardinality(labels) + CASE WHEN _state IS NULL THEN 0 ELSE 1 END;
    list integer := 0;
    place uuid := _before;
    agreed integer := 0;  -- lists that name `place`; with none, it is out already
    newest uuid;
BEGIN
    FOR probe IN 1.._probes LOOP
        IF list < cardinality(labels) THEN
            SELECT l.job_id INTO newest FROM job_labels l
                WHERE l.tenant_id = _tenant_id AND l.label = labels[list + 1]
                      AND l.job_id >= _since AND l.job_id <= place
                      AND (agreed > 0 OR l.job_id < place)
                ORDER BY l.job_id DESC LIMIT 1;
        ELSE  -- by the tenant's own index, whatever the planner believes: see models/listing.py
            SELECT j.id INTO newest FROM jobs j
                WHERE j.tenant_id = ANY (ARRAY[_tenant_id])
                      AND (j.state, j.id) >= (_state, _since) AND (j.state, j.id) <= (_state, place)
                      AND (agreed > 0 OR j.id < place)
                ORDER BY j.tenant_id DESC, j.state DESC, j.id DESC LIMIT 1;
        END IF;
        IF newest IS NULL THEN
            RETURN;
        END IF;
        agreed := CASE WHEN newest = place THEN agreed + 1 ELSE 1 END;
        place := newest;
        list := (list + 1) % lists;
        IF agreed = lists THEN
            agreed := 0;
            IF EXISTS (SELECT FROM jobs j WHERE j.id = place AND j.metadata @> _labels) THEN
                RETURN QUERY SELECT place, true;
                _limit := _limit - 1;
                IF _limit = 0 THEN
                    RETURN;
                END IF;
            END IF;
        END IF;
    END LOOP;
    RETURN QUERY SELECT place, CASE WHEN agreed = 0 THEN false END;
END $$
