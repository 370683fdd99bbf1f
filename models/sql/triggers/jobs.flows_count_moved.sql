-- Counts a job out of what its tenant has queued when it leaves the queue, and in when it is back.
CREATE OR REPLACE TRIGGER flows_count_moved AFTER UPDATE OF state ON jobs
    FOR EACH ROW WHEN ((OLD.state = 'queued') <> (NEW.state = 'queued'))
    EXECUTE FUNCTION flows_count_queued()
