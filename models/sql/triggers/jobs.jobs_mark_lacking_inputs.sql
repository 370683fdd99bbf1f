-- Marks jobs that start from pictures, whoever accepts them.
CREATE OR REPLACE TRIGGER jobs_mark_lacking_inputs BEFORE INSERT ON jobs
    FOR EACH ROW WHEN (NEW.init_file_id IS NOT NULL OR NEW.control_file_id IS NOT NULL)
    EXECUTE FUNCTION jobs_mark_lacking_inputs()
