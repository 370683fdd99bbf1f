-- Links each event to the one before it, whoever appends it.
CREATE OR REPLACE TRIGGER audit_link BEFORE INSERT ON audit_events
    FOR EACH ROW EXECUTE FUNCTION audit_link()
