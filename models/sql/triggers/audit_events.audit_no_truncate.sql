-- Keeps everybody from emptying the log as a whole.
--
-- Statement triggers are not handed down to partitions: months get theirs as they are made.
CREATE OR REPLACE TRIGGER audit_no_truncate BEFORE TRUNCATE ON audit_events
    FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()
