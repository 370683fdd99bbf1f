-- Keeps everybody, also the owner, from changing or deleting what was applied.
CREATE OR REPLACE TRIGGER fleet_revisions_no_change BEFORE UPDATE OR DELETE ON fleet_revisions
    FOR EACH ROW EXECUTE FUNCTION fleet_revisions_refuse()
