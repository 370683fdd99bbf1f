-- Counts a picture when it is stored and when it is erased.
CREATE OR REPLACE TRIGGER files_are_counted AFTER INSERT OR UPDATE OF erased_at ON files
    FOR EACH ROW EXECUTE FUNCTION count_stored_files()
