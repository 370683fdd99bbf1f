-- Make the monthly partitions of the audit log from this month on, as far as they are missing.
--
-- A month is made beside the log and attached to it, which writers do not notice: CREATE TABLE ...
-- PARTITION OF would wait for every reader of the log, and every writer behind it. What has to wait
-- are readers of the default partition, for 200 ms at most; then the sweeper tries again later. The
-- default partition gets no CHECK that would spare its being read: while one stands, rows of that
-- month are refused, and the partition is empty but after a year without a sweeper. Rows that came
-- before their month lie there, where they do no harm, so that a clash is not an error.
CREATE OR REPLACE FUNCTION audit_ensure_partitions(months_ahead integer) RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = public, pg_temp SET lock_timeout = '200ms' AS $$
DECLARE first timestamp; name text;
BEGIN
    FOR ahead IN 0..least(months_ahead, 24) LOOP
        first := date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => ahead);
        name := 'audit_events_' || to_char(first, 'YYYY_MM');
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        BEGIN
            EXECUTE format('CREATE TABLE %I (
                                LIKE audit_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', name);
            -- Row triggers and indexes come with the attaching; this one, per statement, does not.
            EXECUTE format('CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON %I
                            FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()', name);
            EXECUTE format('ALTER TABLE audit_events ATTACH PARTITION %I
                                FOR VALUES FROM (%L) TO (%L)', name, first || '+00',
                           (first + interval '1 month') || '+00');
        EXCEPTION
            WHEN check_violation THEN
                RAISE WARNING
                    'partition % not made: the default partition holds rows of that month', name;
            WHEN lock_not_available THEN
                RAISE WARNING 'partition % not made: somebody reads the log', name;
                EXIT;  -- the next one would be waited for in vain, too
        END;
    END LOOP;
END $$
