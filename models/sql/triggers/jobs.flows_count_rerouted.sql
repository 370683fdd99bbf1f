-- Counts a queued job out of the pool that it leaves, and into the one that it goes to.
CREATE OR REPLACE TRIGGER flows_count_rerouted AFTER UPDATE OF pool ON jobs
    FOR EACH ROW WHEN (OLD.pool <> NEW.pool AND OLD.state = 'queued' AND NEW.state = 'queued')
    EXECUTE FUNCTION flows_count_rerouted()
