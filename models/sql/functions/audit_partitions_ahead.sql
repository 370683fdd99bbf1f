-- Count the coming months that the audit log has a partition for, up to the first without one.
CREATE OR REPLACE FUNCTION audit_partitions_ahead() RETURNS integer
LANGUAGE sql STABLE SET search_path = public, pg_temp AS $$
    SELECT coalesce(min(ahead), 25) - 1 FROM generate_series(0, 24) ahead
    WHERE to_regclass('audit_events_' || to_char(
        date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => ahead), 'YYYY_MM'
    )) IS NULL
$$
