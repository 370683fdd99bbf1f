-- One row per worker: its state, what it serves, which models it cannot load and why, how often it
-- was started again. A worker that ended in good order has none. One row per device on which no
-- worker is started, in the name of the last one there.
CREATE OR REPLACE VIEW workers_now AS
SELECT w.pool, w.name AS worker,
       CASE WHEN w.state <> 'failed'
                 AND w.seen_at < clock_timestamp() - make_interval(secs => w.silent_after_s)
            THEN 'silent' ELSE w.state END AS state,
       w.device, w.slots, array_to_string(w.held, ' ') AS models,
       array_to_string(coalesce(w.loaded, w.held), ' ') AS loaded,
       (SELECT string_agg(f.key, ' ' ORDER BY f.key) FROM jsonb_each(w.failed) f) AS failed_models,
       coalesce(
           w.problem,
           (SELECT string_agg(f.value #>> '{}', '; ' ORDER BY f.key) FROM jsonb_each(w.failed) f)
       ) AS problem,
       w.starts - 1 AS restarts, w.failed_starts, w.started_at,
       round(extract(epoch FROM clock_timestamp() - w.seen_at), 1) AS silent_s, w.host, w.pid,
       w.fleet_revision, w.facts ->> 'waits_for' AS waits_for, w.capacity_class,
       nullif(w.facts ->> 'doing', '') AS doing
FROM workers w
UNION ALL
SELECT d.pool, d.worker, 'quarantined', d.device, 0, NULL, NULL, NULL, d.problem, 0, 0,
       d.quarantined_at,
       round(extract(epoch FROM clock_timestamp() - d.lost_at), 1), d.host, NULL, NULL, NULL,
       d.capacity_class, NULL
FROM lost_devices d WHERE d.quarantined_at IS NOT NULL
