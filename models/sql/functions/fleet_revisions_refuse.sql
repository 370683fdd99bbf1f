-- Refuse to change or remove a revision of the fleet: jobs name them.
CREATE OR REPLACE FUNCTION fleet_revisions_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'revisions of the fleet are append-only: % refused', TG_OP
        USING ERRCODE = 'insufficient_privilege';
END $$
