-- Counts a job out of what its tenant has queued when it leaves the queue, and in when it is back;
-- and from one pool to another while it waits.
CREATE OR REPLACE TRIGGER flows_count_moved AFTER UPDATE OF state, pool ON jobs
    FOR EACH ROW WHEN (
        (OLD.state = 'queued') <> (NEW.state = 'queued')
        OR (NEW.state = 'queued' AND OLD.state = 'queued' AND OLD.pool <> NEW.pool))
    EXECUTE FUNCTION flows_count_queued()
