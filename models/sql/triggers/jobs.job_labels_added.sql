-- Lists a new job under each entry of its metadata.
CREATE OR REPLACE TRIGGER job_labels_added AFTER INSERT ON jobs
    FOR EACH ROW WHEN (NEW.metadata IS NOT NULL) EXECUTE FUNCTION job_labels_follow()
