-- Give a new audit event its number and its link to the one before it in its chain.
--
-- Whatever the application wrote there is overwritten, so that nobody can skip or forge a link.
-- Locks the chain's head until commit. `at` is left alone, for a BEFORE trigger may not move a row
-- to another partition.
CREATE OR REPLACE FUNCTION audit_link() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp AS $$
DECLARE head audit_chains%ROWTYPE;
BEGIN
    INSERT INTO audit_chains AS c (chain_id) VALUES (NEW.chain_id)
        ON CONFLICT (chain_id) DO UPDATE SET last_seq = c.last_seq RETURNING * INTO head;
    NEW.seq := head.last_seq + 1;
    NEW.prev_hash := head.last_hash;
    NEW.hash := audit_digest(NEW.prev_hash, NEW.chain_id, NEW.seq, NEW.id, NEW.at, NEW.event,
                             NEW.actor, NEW.job_id, NEW.attempt, NEW.facts);
    UPDATE audit_chains SET last_seq = NEW.seq, last_hash = NEW.hash WHERE chain_id = NEW.chain_id;
    RETURN NEW;
END $$
