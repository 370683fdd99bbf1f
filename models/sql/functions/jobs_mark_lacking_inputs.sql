-- Mark a new job that starts from pictures: it waits for them before it is announced.
CREATE OR REPLACE FUNCTION jobs_mark_lacking_inputs() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    NEW.lacks_inputs := true;
    RETURN NEW;
END $$
