-- Lists a job under its new metadata; under none, when they are erased.
CREATE OR REPLACE TRIGGER job_labels_changed AFTER UPDATE OF metadata ON jobs
    FOR EACH ROW WHEN (NEW.metadata IS DISTINCT FROM OLD.metadata)
    EXECUTE FUNCTION job_labels_follow()
