-- One row per revision of fleet.toml that was applied; the one with the highest number is in force.
CREATE OR REPLACE VIEW fleet_history AS
SELECT r.number, r.applied_at, r.actor, r.note, r.rollback_of, r.sha256, r.content
FROM fleet_revisions r
