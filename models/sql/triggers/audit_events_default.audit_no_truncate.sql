-- Keeps everybody from emptying the partition for events without a month of their own.
CREATE OR REPLACE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit_events_default
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()
