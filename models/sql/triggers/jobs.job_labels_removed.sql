-- Takes a job that is removed off its lists.
CREATE OR REPLACE TRIGGER job_labels_removed AFTER DELETE ON jobs
    FOR EACH ROW WHEN (OLD.metadata IS NOT NULL) EXECUTE FUNCTION job_labels_follow()
