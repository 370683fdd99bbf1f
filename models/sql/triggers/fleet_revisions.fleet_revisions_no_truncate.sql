-- Keeps everybody from emptying the history of the fleet.
CREATE OR REPLACE TRIGGER fleet_revisions_no_truncate BEFORE TRUNCATE ON fleet_revisions
    FOR EACH STATEMENT EXECUTE FUNCTION fleet_revisions_refuse()
