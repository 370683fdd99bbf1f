-- Counts a job into what its tenant has queued.
CREATE OR REPLACE TRIGGER flows_count_accepted AFTER INSERT ON jobs
    FOR EACH ROW WHEN (NEW.state = 'queued') EXECUTE FUNCTION flows_count_queued()
