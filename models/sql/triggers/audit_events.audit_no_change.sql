-- Keeps everybody, also the owner, from changing or deleting an event.
CREATE OR REPLACE TRIGGER audit_no_change BEFORE UPDATE OR DELETE ON audit_events
    FOR EACH ROW EXECUTE FUNCTION audit_refuse()
