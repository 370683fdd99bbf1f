-- A database as the migrations 0001 to 0012 left it, with a few rows: what pg_dump says of it, without
-- the rights of the processes, which are granted anew by every run, and without most months of the log.
SET check_function_bodies = false;
CREATE FUNCTION public.accept_jobs(_jobs jsonb, _tenant_id uuid, _api_key_id uuid, _currency text, _actor text) RETURNS TABLE(id uuid, accepted_at timestamp with time zone, start_by timestamp with time zone, release_tag double precision, usage_day date)
    LANGUAGE plpgsql
    AS $$
#variable_conflict use_column
BEGIN RETURN QUERY
    WITH asked AS MATERIALIZED (
        SELECT * FROM jsonb_to_recordset(_jobs) AS asked (
            place integer, id uuid, event_id uuid, facts jsonb, start_within_s double precision, announced boolean,
            pool text, tier text, model text, model_alias text, model_version text, prompt text, negative_prompt text, width_px integer,
            height_px integer, num_steps integer, guidance double precision, sampler text, seed bigint, num_images
            integer, output_format text, init_file_id uuid, mask_file_id uuid, control_file_id uuid, strength double
            precision, adapters jsonb, precision text, determinism text, bucket_rows integer, run_within_s double
            precision, predicted_s double precision, eta_raw_s double precision, megapixel_steps numeric(18, 6), metadata jsonb, warnings jsonb, requeue_of uuid, replay_of uuid)
    ), placed AS MATERIALIZED (
        SELECT asked.*, predicted_s / weight AS own_s, sum(predicted_s / weight) OVER (PARTITION BY pool, tier ORDER BY place) AS upto_s
        FROM asked, (SELECT weight FROM tenants WHERE id = _tenant_id) tenant
    ), whole AS MATERIALIZED (
        SELECT pool, tier, max(upto_s) AS cost_s, coalesce(
                   (SELECT virtual_s FROM fair_clocks c WHERE c.pool = placed.pool AND c.tier = placed.tier),
                   extract(epoch FROM clock_timestamp())::double precision) AS clock_s
        FROM placed GROUP BY pool, tier
    ), flow AS (
        INSERT INTO flows AS f (pool, tier, tenant_id, finish_tag)
            SELECT pool, tier, _tenant_id, clock_s + cost_s FROM whole ORDER BY pool, tier
        ON CONFLICT (pool, tier, tenant_id) DO UPDATE SET
            finish_tag = greatest(
                excluded.finish_tag, f.finish_tag + (SELECT cost_s FROM whole w WHERE (w.pool, w.tier) = (f.pool, f.tier)))
        RETURNING f.pool, f.tier, f.finish_tag - (SELECT cost_s FROM whole w WHERE (w.pool, w.tier) = (f.pool, f.tier)) AS start_tag
    ), ledger AS (
        INSERT INTO usage_ledger AS u (tenant_id, day, reserved, jobs_accepted)
            SELECT _tenant_id, (clock_timestamp() AT TIME ZONE 'UTC')::date, sum(megapixel_steps), count(*)
            FROM placed JOIN flow USING (pool, tier)
        ON CONFLICT (tenant_id, day) DO UPDATE SET
            reserved = u.reserved + excluded.reserved, jobs_accepted = u.jobs_accepted + excluded.jobs_accepted
        RETURNING day
    ), job AS (
        INSERT INTO jobs (id, tenant_id, api_key_id, currency, start_by, release_tag, usage_day, announced_at,
                          pool, tier, model, model_alias, model_version, prompt, negative_prompt, width_px, height_px, num_steps, guidance, sampler,
                          seed, num_images, output_format, init_file_id, mask_file_id, control_file_id, strength, adapters, precision,
                          determinism, bucket_rows, run_within_s, predicted_s, eta_raw_s, megapixel_steps, metadata, warnings, requeue_of,
                          replay_of)
            SELECT id, _tenant_id, _api_key_id, _currency, clock_timestamp() + make_interval(secs => start_within_s),
                   start_tag + upto_s - own_s, day, CASE WHEN announced THEN clock_timestamp() END,
                   pool, tier, model, model_alias, model_version, prompt, negative_prompt, width_px, height_px, num_steps, guidance, sampler,
                   seed, num_images, output_format, init_file_id, mask_file_id, control_file_id, strength, adapters, precision,
                   determinism, bucket_rows, run_within_s, predicted_s, eta_raw_s, megapixel_steps, metadata, warnings, requeue_of,
                   replay_of
            FROM placed JOIN flow USING (pool, tier) CROSS JOIN ledger ORDER BY place
        RETURNING id, accepted_at, start_by, release_tag, usage_day, seed, num_images, pool, tier, announced_at
    ), image AS (
        INSERT INTO images (job_id, index, seed) SELECT id, index, seed + index FROM job, generate_series(0, num_images - 1) index
    ), clock AS (
        INSERT INTO fair_clocks AS c (pool, tier, virtual_s)
            SELECT pool, tier, max(release_tag) FROM job WHERE announced_at IS NOT NULL GROUP BY pool, tier
        ON CONFLICT (pool, tier) DO UPDATE SET virtual_s = greatest(c.virtual_s, excluded.virtual_s)
    ), event AS (
        INSERT INTO audit_events (id, chain_id, seq, event, actor, job_id, facts, prev_hash, hash)
            SELECT event_id, _tenant_id::text, 0, 'job:request:accepted', _actor, id, facts, '', ''
            FROM placed JOIN job USING (id) ORDER BY place
    )
    SELECT id, accepted_at, start_by, release_tag, usage_day FROM job;
END $$;
CREATE FUNCTION public.audit_checkpoints_digest() RETURNS text
    LANGUAGE sql STABLE
    SET search_path TO 'public', 'pg_temp'
    AS $$
    SELECT encode(sha256(convert_to(coalesce(string_agg(concat_ws(' ', chain_id, seq, encode(hash, 'hex')), E'\n'
                                                        ORDER BY chain_id COLLATE "C", seq), ''), 'UTF8')), 'hex')
    FROM audit_checkpoints
$$;
CREATE FUNCTION public.audit_digest(prev_hash bytea, chain_id text, seq bigint, id uuid, at timestamp with time zone, event text, actor text, job_id uuid, attempt integer, facts jsonb) RETURNS bytea
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
    SELECT sha256(convert_to(jsonb_build_array(encode(prev_hash, 'hex'), chain_id, seq, id, (extract(epoch FROM at) * 1000000)::bigint,
                                               event, actor, job_id, attempt, facts)::text, 'UTF8'))
$$;
CREATE FUNCTION public.audit_ensure_partitions(months_ahead integer) RETURNS void
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'public', 'pg_temp'
    SET lock_timeout TO '200ms'
    AS $$
DECLARE first timestamp; name text;
BEGIN
    FOR ahead IN 0..least(months_ahead, 24) LOOP
        first := date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => ahead);
        name := 'audit_events_' || to_char(first, 'YYYY_MM');
        CONTINUE WHEN to_regclass(name) IS NOT NULL;
        BEGIN
            EXECUTE format('CREATE TABLE %I (LIKE audit_events INCLUDING DEFAULTS INCLUDING CONSTRAINTS)', name);
            -- Row triggers and indexes come with the attaching; this trigger, per statement, does not.
            EXECUTE format('CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON %I
                            FOR EACH STATEMENT EXECUTE FUNCTION audit_refuse()', name);
            EXECUTE format('ALTER TABLE audit_events ATTACH PARTITION %I FOR VALUES FROM (%L) TO (%L)',
                           name, first || '+00', (first + interval '1 month') || '+00');
        EXCEPTION
            WHEN check_violation THEN
                RAISE WARNING 'partition % not made: the default partition holds rows of that month', name;
            WHEN lock_not_available THEN
                RAISE WARNING 'partition % not made: somebody reads the log', name;
                EXIT;  -- the next one would be waited for in vain, too
        END;
    END LOOP;
END $$;
CREATE FUNCTION public.audit_link() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'public', 'pg_temp'
    AS $$
DECLARE head audit_chains%ROWTYPE;
BEGIN
    INSERT INTO audit_chains AS c (chain_id) VALUES (NEW.chain_id)
        ON CONFLICT (chain_id) DO UPDATE SET last_seq = c.last_seq RETURNING * INTO head;
    NEW.seq := head.last_seq + 1;
    NEW.prev_hash := head.last_hash;
    NEW.hash := audit_digest(NEW.prev_hash, NEW.chain_id, NEW.seq, NEW.id, NEW.at, NEW.event, NEW.actor,
                             NEW.job_id, NEW.attempt, NEW.facts);
    UPDATE audit_chains SET last_seq = NEW.seq, last_hash = NEW.hash WHERE chain_id = NEW.chain_id;
    RETURN NEW;
END $$;
CREATE FUNCTION public.audit_partitions_ahead() RETURNS integer
    LANGUAGE sql STABLE
    SET search_path TO 'public', 'pg_temp'
    AS $$
    SELECT coalesce(min(ahead), 25) - 1 FROM generate_series(0, 24) ahead
    WHERE to_regclass('audit_events_' || to_char(date_trunc('month', now() AT TIME ZONE 'UTC') + make_interval(months => ahead),
                                                 'YYYY_MM')) IS NULL
$$;
CREATE FUNCTION public.audit_prune_month(month date, actor text, more_facts jsonb DEFAULT '{}'::jsonb) RETURNS bigint
    LANGUAGE plpgsql
    SET search_path TO 'public', 'pg_temp'
    SET lock_timeout TO '200ms'
    AS $_$
DECLARE name text := 'audit_events_' || to_char(month, 'YYYY_MM'); events bigint; facts jsonb;
BEGIN
    IF (date_trunc('month', month::timestamp) + interval '1 month' + interval '1 day') > now() AT TIME ZONE 'UTC' THEN
        RAISE EXCEPTION 'the month % is not over', to_char(month, 'YYYY-MM') USING ERRCODE = 'invalid_parameter_value';
    END IF;
    EXECUTE format('SELECT count(*) FROM %I', name) INTO events;
    EXECUTE format($sql$
        INSERT INTO audit_checkpoints (chain_id, seq, hash)
            SELECT e.chain_id, e.seq, e.hash FROM (
                SELECT chain_id, seq, hash, lead(seq) OVER (PARTITION BY chain_id ORDER BY seq) AS next_seq FROM %1$I
            ) e
            WHERE e.next_seq IS DISTINCT FROM e.seq + 1 AND (
                EXISTS (SELECT FROM audit_events n WHERE n.chain_id = e.chain_id AND n.seq = e.seq + 1)
                OR EXISTS (SELECT FROM audit_chains c WHERE c.chain_id = e.chain_id AND c.last_seq = e.seq))
        ON CONFLICT (chain_id, seq) DO NOTHING
    $sql$, name);
    EXECUTE format('DELETE FROM audit_checkpoints c USING %I e WHERE e.chain_id = c.chain_id AND e.seq = c.seq + 1', name);
    LOCK TABLE audit_events IN ACCESS EXCLUSIVE MODE;  -- before the chain's head, as whoever appends does
    facts := more_facts || jsonb_build_object('month', to_char(month, 'YYYY-MM'), 'events', events,
                                              'checkpoints_sha256', audit_checkpoints_digest());
    INSERT INTO audit_events (id, chain_id, seq, event, actor, facts, prev_hash, hash)
        VALUES (gen_random_uuid(), 'system', 0, 'audit:month:pruned', actor, facts, '', '');
    EXECUTE format('ALTER TABLE audit_events DETACH PARTITION %I', name);
    EXECUTE format('DROP TABLE %I', name);
    RETURN events;
END $_$;
CREATE FUNCTION public.audit_refuse() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    RAISE EXCEPTION 'the audit log is append-only: % refused', TG_OP USING ERRCODE = 'insufficient_privilege';
END $$;
CREATE FUNCTION public.audit_verify(chain text DEFAULT NULL::text) RETURNS TABLE(chain_id text, seq bigint, event_id uuid, problem text)
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'public', 'pg_temp'
    AS $$ SELECT * FROM audit_verify_since(NULL, chain) $$;
CREATE FUNCTION public.audit_verify_since(since timestamp with time zone, chain text DEFAULT NULL::text) RETURNS TABLE(chain_id text, seq bigint, event_id uuid, problem text)
    LANGUAGE sql STABLE SECURITY DEFINER
    SET search_path TO 'public', 'pg_temp'
    AS $$
    WITH linked AS (
        SELECT known.*, lag(known.seq) OVER w AS before_seq, lag(known.hash) OVER w AS before_hash
        FROM (
            SELECT e.chain_id, e.seq, e.hash, e.prev_hash, e.id, e.at, e.event, e.actor, e.job_id, e.attempt, e.facts, true AS is_event
            FROM audit_events e WHERE (chain IS NULL OR e.chain_id = chain) AND (since IS NULL OR e.at >= since)
            UNION ALL
            SELECT c.chain_id, c.seq, c.hash, NULL, NULL, '-infinity', NULL, NULL, NULL, NULL, NULL, false
            FROM audit_checkpoints c WHERE chain IS NULL OR c.chain_id = chain
        ) known
        WINDOW w AS (PARTITION BY known.chain_id ORDER BY known.seq, known.at)
    ), events AS (
        SELECT l.*, l.seq = coalesce(l.before_seq, 0) + 1 AS follows FROM linked l WHERE l.is_event
    ), before AS MATERIALIZED (
        SELECT e.chain_id, e.seq, p.hash FROM events e JOIN audit_events p ON p.chain_id = e.chain_id AND p.seq = e.seq - 1
        WHERE since IS NOT NULL AND NOT e.follows AND p.at < since
    ), pruned AS (
        SELECT e.seq, e.id, e.facts ->> 'checkpoints_sha256' AS digest FROM audit_events e
        WHERE e.chain_id = 'system' AND e.event = 'audit:month:pruned' ORDER BY e.seq DESC LIMIT 1
    )
    SELECT e.chain_id, e.seq, e.id, 'the event was changed: its hash does not fit its content' FROM events e
        WHERE e.hash <> audit_digest(e.prev_hash, e.chain_id, e.seq, e.id, e.at, e.event, e.actor, e.job_id, e.attempt, e.facts)
    UNION ALL
    SELECT e.chain_id, e.seq, e.id, 'events are missing before this one' FROM events e
        WHERE NOT e.follows AND NOT EXISTS (SELECT FROM before b WHERE b.chain_id = e.chain_id AND b.seq = e.seq)
    UNION ALL
    SELECT e.chain_id, e.seq, e.id, 'the link to the event before is broken' FROM events e
        WHERE e.follows AND e.prev_hash <> coalesce(e.before_hash, ''::bytea)
    UNION ALL
    SELECT e.chain_id, e.seq, e.id, 'the link to the event before is broken' FROM events e JOIN before b USING (chain_id, seq)
        WHERE e.prev_hash <> b.hash
    UNION ALL
    SELECT h.chain_id, h.last_seq, NULL::uuid, 'the newest events are missing' FROM audit_chains h
        WHERE (chain IS NULL OR h.chain_id = chain) AND h.last_seq > 0 AND (
            NOT EXISTS (SELECT FROM audit_events e WHERE e.chain_id = h.chain_id AND e.seq = h.last_seq AND e.hash = h.last_hash
                        UNION ALL
                        SELECT FROM audit_checkpoints c WHERE c.chain_id = h.chain_id AND c.seq = h.last_seq AND c.hash = h.last_hash)
            OR EXISTS (SELECT FROM audit_events e WHERE e.chain_id = h.chain_id AND e.seq > h.last_seq))
    UNION ALL
    SELECT DISTINCT l.chain_id, 0::bigint, NULL::uuid, 'the chain has no head' FROM linked l
        WHERE NOT EXISTS (SELECT FROM audit_chains c WHERE c.chain_id = l.chain_id)
    UNION ALL
    SELECT 'system', p.seq, p.id, 'the checkpoints of pruned months were changed'
        FROM (SELECT 1) one LEFT JOIN pruned p ON true
        WHERE coalesce(p.digest, encode(sha256(''), 'hex')) <> audit_checkpoints_digest()
    ORDER BY 1, 2
$$;
CREATE FUNCTION public.count_stored_files() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
DECLARE
    _files bigint := (CASE WHEN NEW.erased_at IS NULL THEN 1 ELSE 0 END)
        - (CASE WHEN TG_OP = 'UPDATE' AND OLD.erased_at IS NULL THEN 1 ELSE 0 END);
BEGIN
    IF _files <> 0 THEN
        INSERT INTO stored_files AS s (tenant_id, files, size_bytes) VALUES (NEW.tenant_id, _files, _files * NEW.size_bytes)
        ON CONFLICT (tenant_id) DO UPDATE SET files = s.files + excluded.files, size_bytes = s.size_bytes + excluded.size_bytes;
    END IF;
    RETURN NULL;
END $$;
CREATE FUNCTION public.flows_count_queued() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
DECLARE sign integer := CASE WHEN NEW.state = 'queued' THEN 1 ELSE -1 END;
BEGIN
    INSERT INTO flows AS f (pool, tier, tenant_id, queued_jobs, queued_images, queued_s)
        VALUES (NEW.pool, NEW.tier, NEW.tenant_id, sign, sign * NEW.num_images, sign * NEW.predicted_s)
        ON CONFLICT (pool, tier, tenant_id) DO UPDATE SET
            queued_jobs = f.queued_jobs + sign,
            queued_images = f.queued_images + sign * NEW.num_images,
            -- An empty flow has nothing queued, whatever a million additions of fractions have left.
            queued_s = CASE WHEN f.queued_jobs + sign = 0 THEN 0 ELSE greatest(0, f.queued_s + sign * NEW.predicted_s) END;
    RETURN NULL;
END $$;
CREATE FUNCTION public.job_label(key text, value text) RETURNS uuid
    LANGUAGE sql IMMUTABLE PARALLEL SAFE
    AS $$
    SELECT encode(substr(sha256(convert_to(key || E'\x1f' || value, 'UTF8')), 1, 16), 'hex')::uuid
$$;
CREATE FUNCTION public.job_labels_follow() RETURNS trigger
    LANGUAGE plpgsql SECURITY DEFINER
    SET search_path TO 'public', 'pg_temp'
    AS $$
BEGIN
    IF TG_OP <> 'INSERT' THEN
        DELETE FROM job_labels l USING jsonb_each_text(OLD.metadata) m
            WHERE l.tenant_id = OLD.tenant_id AND l.label = job_label(m.key, m.value) AND l.job_id = OLD.id;
    END IF;
    IF TG_OP <> 'DELETE' THEN
        INSERT INTO job_labels (tenant_id, label, job_id)
            SELECT NEW.tenant_id, job_label(m.key, m.value), NEW.id FROM jsonb_each_text(NEW.metadata) m
        ON CONFLICT DO NOTHING;
    END IF;
    RETURN NULL;
END $$;
CREATE FUNCTION public.jobs_mark_lacking_inputs() RETURNS trigger
    LANGUAGE plpgsql
    AS $$
BEGIN
    NEW.lacks_inputs := true;
    RETURN NEW;
END $$;
CREATE FUNCTION public.jobs_with_labels(_tenant_id uuid, _labels jsonb, _state text, _since uuid, _before uuid, _limit integer, _probes integer) RETURNS TABLE(job_id uuid, is_found boolean)
    LANGUAGE plpgsql STABLE
    AS $$
DECLARE
    labels uuid[] := ARRAY(SELECT job_label(m.key, m.value) FROM jsonb_each_text(_labels) m);
    lists integer := cardinality(labels) + CASE WHEN _state IS NULL THEN 0 ELSE 1 END;
    list integer := 0;
    place uuid := _before;
    agreed integer := 0;  -- lists that name `place`; with none, it is out already
    newest uuid;
BEGIN
    FOR probe IN 1.._probes LOOP
        IF list < cardinality(labels) THEN
            SELECT l.job_id INTO newest FROM job_labels l
                WHERE l.tenant_id = _tenant_id AND l.label = labels[list + 1] AND l.job_id >= _since AND l.job_id <= place
                      AND (agreed > 0 OR l.job_id < place)
                ORDER BY l.job_id DESC LIMIT 1;
        ELSE  -- by the tenant's own index, whatever the planner believes: see models/listing.py
            SELECT j.id INTO newest FROM jobs j
                WHERE j.tenant_id = ANY (ARRAY[_tenant_id]) AND (j.state, j.id) >= (_state, _since) AND (j.state, j.id) <= (_state, place)
                      AND (agreed > 0 OR j.id < place)
                ORDER BY j.tenant_id DESC, j.state DESC, j.id DESC LIMIT 1;
        END IF;
        IF newest IS NULL THEN
            RETURN;
        END IF;
        agreed := CASE WHEN newest = place THEN agreed + 1 ELSE 1 END;
        place := newest;
        list := (list + 1) % lists;
        IF agreed = lists THEN
            agreed := 0;
            IF EXISTS (SELECT FROM jobs j WHERE j.id = place AND j.metadata @> _labels) THEN
                RETURN QUERY SELECT place, true;
                _limit := _limit - 1;
                IF _limit = 0 THEN
                    RETURN;
                END IF;
            END IF;
        END IF;
    END LOOP;
    RETURN QUERY SELECT place, CASE WHEN agreed = 0 THEN false END;
END $$;
CREATE TABLE public.alembic_version (
    version_num character varying(32) NOT NULL
);
CREATE TABLE public.api_keys (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    kid text NOT NULL,
    name text NOT NULL,
    digest bytea NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    expires_at timestamp with time zone,
    revoked_at timestamp with time zone,
    scopes text[] DEFAULT '{generate,read}'::text[] NOT NULL,
    last_used_at timestamp with time zone,
    CONSTRAINT api_keys_scopes_are_known CHECK (((scopes <@ ARRAY['generate'::text, 'read'::text, 'admin'::text]) AND (scopes <> '{}'::text[])))
);
CREATE TABLE public.artifacts (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    job_id uuid NOT NULL,
    index integer NOT NULL,
    object_key text NOT NULL,
    content_type text NOT NULL,
    size_bytes bigint NOT NULL,
    width_px integer NOT NULL,
    height_px integer NOT NULL,
    pixels_sha256 text NOT NULL,
    content_sha256 text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    erased_at timestamp with time zone
);
CREATE TABLE public.attempts (
    job_id uuid NOT NULL,
    attempt integer NOT NULL,
    worker text NOT NULL,
    device text NOT NULL,
    started_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    ended_at timestamp with time zone,
    outcome text NOT NULL,
    waste_class text,
    error text,
    steps integer DEFAULT 0 NOT NULL,
    shared_steps integer DEFAULT 0 NOT NULL,
    max_rows integer DEFAULT 0 NOT NULL,
    max_images integer DEFAULT 0 NOT NULL,
    mean_rows double precision DEFAULT 0 NOT NULL,
    bucket_rows integer,
    device_seconds double precision DEFAULT 0 NOT NULL,
    encode_s double precision DEFAULT 0 NOT NULL,
    denoise_s double precision DEFAULT 0 NOT NULL,
    decode_s double precision DEFAULT 0 NOT NULL,
    fingerprint text,
    fingerprint_facts jsonb,
    resumed_steps integer DEFAULT 0 NOT NULL,
    lost_steps integer DEFAULT 0 NOT NULL,
    lost_cause text,
    snapshot_bytes bigint DEFAULT 0 NOT NULL,
    snapshot_store text
);
CREATE TABLE public.audit_chains (
    chain_id text NOT NULL,
    last_seq bigint DEFAULT 0 NOT NULL,
    last_hash bytea DEFAULT '\x'::bytea NOT NULL
);
CREATE TABLE public.tenants (
    id uuid NOT NULL,
    name text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    weight double precision DEFAULT 1 NOT NULL,
    requests_per_minute integer,
    megapixel_steps_per_minute double precision,
    burst_megapixel_steps double precision,
    max_concurrent_jobs integer,
    daily_megapixel_steps numeric(18,6),
    monthly_megapixel_steps numeric(18,6),
    allowed_tiers text[],
    allowed_models text[],
    url_inputs boolean DEFAULT false NOT NULL,
    max_stored_bytes bigint,
    CONSTRAINT tenants_budget_has_rate_and_burst CHECK (((megapixel_steps_per_minute IS NULL) = (burst_megapixel_steps IS NULL))),
    CONSTRAINT tenants_limits_are_positive CHECK ((LEAST((requests_per_minute)::double precision, megapixel_steps_per_minute, burst_megapixel_steps, (max_concurrent_jobs)::double precision) > (0)::double precision)),
    CONSTRAINT tenants_max_stored_bytes_is_not_negative CHECK ((max_stored_bytes >= 0)),
    CONSTRAINT tenants_quotas_are_not_negative CHECK ((LEAST(daily_megapixel_steps, monthly_megapixel_steps) >= (0)::numeric)),
    CONSTRAINT tenants_weight_is_positive CHECK ((weight > (0)::double precision))
);
CREATE VIEW public.audit_chain_status AS
 SELECT COALESCE(t.name, c.chain_id) AS chain,
    c.chain_id,
    c.last_seq AS events,
    encode(c.last_hash, 'hex'::text) AS head
   FROM (public.audit_chains c
     LEFT JOIN public.tenants t ON (((t.id)::text = c.chain_id)));
COMMENT ON VIEW public.audit_chain_status IS 'One row per audit chain: how many events it has and its head. Check it with: SELECT * FROM audit_verify().';
CREATE TABLE public.audit_checkpoints (
    chain_id text NOT NULL,
    seq bigint NOT NULL,
    hash bytea NOT NULL
);
CREATE TABLE public.audit_events (
    id uuid NOT NULL,
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    chain_id text NOT NULL,
    seq bigint NOT NULL,
    event text NOT NULL,
    actor text NOT NULL,
    job_id uuid,
    attempt integer,
    facts jsonb NOT NULL,
    prev_hash bytea NOT NULL,
    hash bytea NOT NULL
)
PARTITION BY RANGE (at);
CREATE TABLE public.audit_events_2026_11 (
    id uuid NOT NULL,
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    chain_id text NOT NULL,
    seq bigint NOT NULL,
    event text NOT NULL,
    actor text NOT NULL,
    job_id uuid,
    attempt integer,
    facts jsonb NOT NULL,
    prev_hash bytea NOT NULL,
    hash bytea NOT NULL
);
CREATE TABLE public.audit_events_default (
    id uuid NOT NULL,
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    chain_id text NOT NULL,
    seq bigint NOT NULL,
    event text NOT NULL,
    actor text NOT NULL,
    job_id uuid,
    attempt integer,
    facts jsonb NOT NULL,
    prev_hash bytea NOT NULL,
    hash bytea NOT NULL
);
CREATE VIEW public.audit_log AS
 SELECT e.at,
    COALESCE(t.name, e.chain_id) AS chain,
    e.seq,
    e.event,
    e.actor,
    e.job_id,
    e.attempt,
    ( SELECT string_agg(((f.key || '='::text) || (f.value #>> '{}'::text[])), ' '::text ORDER BY f.key) AS string_agg
           FROM jsonb_each(e.facts) f(key, value)
          WHERE (length((f.value #>> '{}'::text[])) <= 64)) AS facts_text,
    e.facts,
    e.id AS event_id,
    encode(e.prev_hash, 'hex'::text) AS prev_hash,
    encode(e.hash, 'hex'::text) AS hash
   FROM (public.audit_events e
     LEFT JOIN public.tenants t ON (((t.id)::text = e.chain_id)));
COMMENT ON VIEW public.audit_log IS 'One row per audit event, readable: who did what to which job, with its place in the hash chain.';
CREATE TABLE public.jobs (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    api_key_id uuid,
    state text DEFAULT 'queued'::text NOT NULL,
    pool text NOT NULL,
    tier text NOT NULL,
    model text NOT NULL,
    model_version text NOT NULL,
    prompt text NOT NULL,
    negative_prompt text NOT NULL,
    width_px integer NOT NULL,
    height_px integer NOT NULL,
    num_steps integer NOT NULL,
    guidance double precision NOT NULL,
    sampler text NOT NULL,
    seed bigint NOT NULL,
    num_images integer NOT NULL,
    output_format text NOT NULL,
    "precision" text NOT NULL,
    determinism text NOT NULL,
    bucket_rows integer,
    release_tag double precision DEFAULT (EXTRACT(epoch FROM clock_timestamp()))::double precision NOT NULL,
    accepted_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    announced_at timestamp with time zone,
    start_by timestamp with time zone NOT NULL,
    started_at timestamp with time zone,
    rendered_at timestamp with time zone,
    store_by timestamp with time zone,
    finished_at timestamp with time zone,
    attempt integer DEFAULT 0 NOT NULL,
    counted_attempts integer DEFAULT 0 NOT NULL,
    worker text,
    lease_expires_at timestamp with time zone,
    failure_code text,
    failure_detail text,
    device_seconds double precision DEFAULT 0 NOT NULL,
    cost numeric(14,6),
    currency text NOT NULL,
    predicted_s double precision DEFAULT 0 NOT NULL,
    eta_raw_s double precision,
    is_front boolean DEFAULT false NOT NULL,
    run_within_s double precision,
    run_by timestamp with time zone,
    requeue_of uuid,
    init_file_id uuid,
    mask_file_id uuid,
    control_file_id uuid,
    strength double precision,
    adapters jsonb,
    replay_of uuid,
    metadata jsonb,
    erased_at timestamp with time zone,
    megapixel_steps numeric(18,6) DEFAULT 0 NOT NULL,
    usage_day date,
    model_alias text,
    warnings jsonb,
    lacks_inputs boolean DEFAULT false NOT NULL,
    inputs_asked_at timestamp with time zone,
    CONSTRAINT jobs_bucket_when_reproducible CHECK (((determinism = 'reproducible'::text) = (bucket_rows IS NOT NULL))),
    CONSTRAINT jobs_counts_are_positive CHECK (((num_images >= 1) AND (num_steps >= 1) AND (seed >= 0))),
    CONSTRAINT jobs_failure_has_code CHECK (((failure_code IS NULL) = (state <> ALL (ARRAY['failed'::text, 'rejected'::text])))),
    CONSTRAINT jobs_finished_once_final CHECK (((state = ANY (ARRAY['succeeded'::text, 'failed'::text, 'rejected'::text, 'canceled'::text, 'expired'::text])) = (finished_at IS NOT NULL))),
    CONSTRAINT jobs_lease_while_running CHECK (((state = 'running'::text) = (lease_expires_at IS NOT NULL))),
    CONSTRAINT jobs_mask_needs_init CHECK (((mask_file_id IS NULL) OR (init_file_id IS NOT NULL))),
    CONSTRAINT jobs_sides_are_positive CHECK (((width_px >= 1) AND (height_px >= 1))),
    CONSTRAINT jobs_state_is_known CHECK ((state = ANY (ARRAY['queued'::text, 'running'::text, 'storing'::text, 'succeeded'::text, 'failed'::text, 'rejected'::text, 'canceled'::text, 'expired'::text]))),
    CONSTRAINT jobs_store_by_while_storing CHECK (((state = 'storing'::text) = (store_by IS NOT NULL))),
    CONSTRAINT jobs_strength_with_init CHECK (((init_file_id IS NULL) = (strength IS NULL)))
);
CREATE VIEW public.dead_letters AS
 SELECT j.id AS job_id,
    t.name AS tenant,
    j.pool,
    j.tier,
    j.model,
    j.failure_code,
    j.failure_detail AS last_error,
    j.attempt AS attempts,
    j.counted_attempts,
    a.workers,
    a.outcomes,
    j.accepted_at,
    j.finished_at,
    r.id AS requeued_as
   FROM (((public.jobs j
     JOIN public.tenants t ON ((t.id = j.tenant_id)))
     LEFT JOIN public.jobs r ON ((r.requeue_of = j.id)))
     LEFT JOIN LATERAL ( SELECT string_agg(DISTINCT attempts.worker, ' '::text ORDER BY attempts.worker) AS workers,
            string_agg(attempts.outcome, ' '::text ORDER BY attempts.attempt) AS outcomes
           FROM public.attempts
          WHERE (attempts.job_id = j.id)) a ON (true))
  WHERE (j.state = 'failed'::text);
COMMENT ON VIEW public.dead_letters IS 'One row per failed job: why, after how many tries, on which workers. To try one again: darkroom requeue JOB.';
CREATE TABLE public.fair_clocks (
    pool text NOT NULL,
    tier text NOT NULL,
    virtual_s double precision NOT NULL
);
CREATE TABLE public.files (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    object_key text NOT NULL,
    mode text NOT NULL,
    size_bytes bigint NOT NULL,
    width_px integer NOT NULL,
    height_px integer NOT NULL,
    content_sha256 text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    erased_at timestamp with time zone
);
CREATE TABLE public.flows (
    pool text NOT NULL,
    tier text NOT NULL,
    tenant_id uuid NOT NULL,
    finish_tag double precision DEFAULT 0 NOT NULL,
    queued_jobs integer DEFAULT 0 NOT NULL,
    queued_images integer DEFAULT 0 NOT NULL,
    queued_s double precision DEFAULT 0 NOT NULL
);
CREATE VIEW public.flows_now AS
 SELECT f.pool,
    f.tier,
    t.name AS tenant,
    t.weight,
    f.queued_jobs,
    f.queued_images,
    round((f.queued_s)::numeric, 1) AS queued_gpu_s,
    round(((f.finish_tag - c.virtual_s))::numeric, 1) AS ahead_s
   FROM ((public.flows f
     JOIN public.tenants t ON ((t.id = f.tenant_id)))
     LEFT JOIN public.fair_clocks c USING (pool, tier))
  WHERE (f.queued_jobs > 0);
COMMENT ON VIEW public.flows_now IS 'One row per tenant with queued jobs in a pool and tier: how much, and its weight in fair order.';
CREATE TABLE public.idempotency_keys (
    tenant_id uuid NOT NULL,
    key text NOT NULL,
    request_sha256 text NOT NULL,
    job_id uuid,
    answer jsonb,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);
CREATE TABLE public.images (
    job_id uuid NOT NULL,
    index integer NOT NULL,
    seed bigint NOT NULL,
    state text DEFAULT 'pending'::text NOT NULL,
    handed_off_attempt integer,
    handed_off_at timestamp with time zone,
    snapshot_ref text,
    steps_done integer DEFAULT 0 NOT NULL,
    device_seconds double precision DEFAULT 0 NOT NULL,
    artifact_id uuid,
    reached_step integer DEFAULT 0 NOT NULL,
    CONSTRAINT images_handed_off_by_attempt CHECK (((state = 'pending'::text) = (handed_off_attempt IS NULL))),
    CONSTRAINT images_state_is_known CHECK ((state = ANY (ARRAY['pending'::text, 'handed_off'::text, 'stored'::text]))),
    CONSTRAINT images_stored_have_artifact CHECK (((state = 'stored'::text) = (artifact_id IS NOT NULL)))
);
CREATE VIEW public.images_by_tenant_day AS
 SELECT t.name AS tenant,
    ((a.created_at AT TIME ZONE 'UTC'::text))::date AS day,
    j.tier,
    j.model,
    count(*) AS images,
    sum(a.size_bytes) AS size_bytes,
    round((sum(i.device_seconds))::numeric, 3) AS gpu_seconds,
    round(sum((j.cost * ((i.device_seconds / NULLIF(j.device_seconds, (0)::double precision)))::numeric)), 6) AS cost,
    j.currency
   FROM (((public.artifacts a
     JOIN public.images i ON ((i.artifact_id = a.id)))
     JOIN public.jobs j ON ((j.id = a.job_id)))
     JOIN public.tenants t ON ((t.id = a.tenant_id)))
  GROUP BY t.name, (((a.created_at AT TIME ZONE 'UTC'::text))::date), j.tier, j.model, j.currency;
COMMENT ON VIEW public.images_by_tenant_day IS 'Stored images per tenant, UTC day, tier and model, with bytes, GPU-seconds and cost.';
CREATE VIEW public.job_history AS
 SELECT j.id AS job_id,
    t.name AS tenant,
    j.state,
    j.tier,
    j.pool,
    j.model,
    j.model_version,
    j.prompt,
    j.negative_prompt,
    ((j.width_px || 'x'::text) || j.height_px) AS size,
    j.num_steps,
    j.guidance,
    j.sampler,
    j.seed,
    j.num_images,
    j.output_format,
    j."precision",
    j.determinism,
    j.bucket_rows,
    j.accepted_at,
    j.started_at,
    j.rendered_at,
    j.finished_at,
    round(EXTRACT(epoch FROM (j.started_at - j.accepted_at)), 3) AS queue_s,
    round(EXTRACT(epoch FROM (j.rendered_at - j.started_at)), 3) AS render_s,
    round(EXTRACT(epoch FROM (j.finished_at - j.rendered_at)), 3) AS store_s,
    round(EXTRACT(epoch FROM (j.finished_at - j.accepted_at)), 3) AS total_s,
    j.attempt AS attempts,
    j.worker,
    a.device,
    COALESCE(a.max_images, 0) AS max_batch_images,
    COALESCE(a.max_rows, 0) AS max_batch_rows,
    COALESCE(a.steps, (0)::bigint) AS steps_run,
    COALESCE(a.shared_steps, (0)::bigint) AS steps_shared,
    round((j.device_seconds)::numeric, 4) AS gpu_seconds,
    j.cost,
    j.currency,
    j.failure_code,
    j.failure_detail,
    i.stored AS images_stored,
        CASE
            WHEN (j.state = ANY (ARRAY['canceled'::text, 'rejected'::text])) THEN i.steps_unstored
            ELSE (0)::bigint
        END AS steps_abandoned
   FROM (((public.jobs j
     JOIN public.tenants t ON ((t.id = j.tenant_id)))
     LEFT JOIN LATERAL ( SELECT max(attempts.device) AS device,
            max(attempts.max_images) AS max_images,
            max(attempts.max_rows) AS max_rows,
            sum(attempts.steps) AS steps,
            sum(attempts.shared_steps) AS shared_steps
           FROM public.attempts
          WHERE (attempts.job_id = j.id)) a ON (true))
     LEFT JOIN LATERAL ( SELECT count(*) FILTER (WHERE (i_1.state = 'stored'::text)) AS stored,
            COALESCE(sum(i_1.steps_done) FILTER (WHERE (i_1.state <> 'stored'::text)), (0)::bigint) AS steps_unstored
           FROM public.images i_1
          WHERE (i_1.job_id = j.id)) i ON (true));
COMMENT ON VIEW public.job_history IS 'One row per job: what was asked, where the time went, what it cost. Newest first by accepted_at.';
CREATE TABLE public.job_labels (
    tenant_id uuid NOT NULL,
    label uuid NOT NULL,
    job_id uuid NOT NULL
);
CREATE TABLE public.learnt_costs (
    pool text NOT NULL,
    model text NOT NULL,
    width_px integer NOT NULL,
    height_px integer NOT NULL,
    row_step_s double precision NOT NULL,
    fixed_s double precision NOT NULL,
    observed integer NOT NULL
);
CREATE TABLE public.learnt_etas (
    pool text NOT NULL,
    tier text NOT NULL,
    ratio_p50 double precision NOT NULL,
    ratio_p90 double precision NOT NULL,
    observed integer NOT NULL,
    learnt_until timestamp with time zone NOT NULL
);
CREATE TABLE public.workers (
    name text NOT NULL,
    pool text NOT NULL,
    device text NOT NULL,
    slots integer NOT NULL,
    started_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    seen_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    facts jsonb NOT NULL,
    silent_after_s double precision DEFAULT 15 NOT NULL
);
CREATE VIEW public.queue_now AS
 WITH queued AS (
         SELECT flows.pool,
            flows.tier,
            sum(flows.queued_jobs) AS jobs,
            sum(flows.queued_images) AS images
           FROM public.flows
          WHERE (flows.queued_jobs > 0)
          GROUP BY flows.pool, flows.tier
        ), announced AS (
         SELECT jobs.pool,
            jobs.tier,
            count(*) AS jobs
           FROM public.jobs
          WHERE ((jobs.state = 'queued'::text) AND (jobs.announced_at IS NOT NULL))
          GROUP BY jobs.pool, jobs.tier
        ), running AS (
         SELECT jobs.pool,
            jobs.tier,
            count(*) AS jobs,
            sum(jobs.num_images) AS images
           FROM public.jobs
          WHERE (jobs.state = 'running'::text)
          GROUP BY jobs.pool, jobs.tier
        ), storing AS (
         SELECT jobs.pool,
            jobs.tier,
            count(*) AS jobs,
            sum(jobs.num_images) AS images
           FROM public.jobs
          WHERE (jobs.state = 'storing'::text)
          GROUP BY jobs.pool, jobs.tier
        ), places AS (
         SELECT queued_1.pool,
            queued_1.tier
           FROM queued queued_1
        UNION
         SELECT running_1.pool,
            running_1.tier
           FROM running running_1
        UNION
         SELECT storing_1.pool,
            storing_1.tier
           FROM storing storing_1
        )
 SELECT p.pool,
    p.tier,
    (COALESCE(queued.jobs, (0)::bigint) - COALESCE(announced.jobs, (0)::bigint)) AS waiting,
    COALESCE(announced.jobs, (0)::bigint) AS announced,
    COALESCE(running.jobs, (0)::bigint) AS running,
    COALESCE(storing.jobs, (0)::bigint) AS storing,
    ((COALESCE(queued.images, (0)::bigint) + COALESCE(running.images, (0)::bigint)) + COALESCE(storing.images, (0)::bigint)) AS images,
    round(EXTRACT(epoch FROM (clock_timestamp() - ( SELECT j.accepted_at
           FROM public.jobs j
          WHERE ((j.pool = p.pool) AND (j.tier = p.tier) AND (j.state = 'queued'::text))
          ORDER BY j.accepted_at
         LIMIT 1))), 1) AS oldest_wait_s,
    ( SELECT count(*) AS count
           FROM public.workers w
          WHERE ((w.pool = p.pool) AND (w.seen_at > (clock_timestamp() - make_interval(secs => w.silent_after_s))))) AS live_workers
   FROM ((((places p
     LEFT JOIN queued USING (pool, tier))
     LEFT JOIN announced USING (pool, tier))
     LEFT JOIN running USING (pool, tier))
     LEFT JOIN storing USING (pool, tier));
COMMENT ON VIEW public.queue_now IS 'One row per pool and tier with unfinished jobs: how many wait, run and are being stored, and how long the oldest has waited.';
CREATE TABLE public.stored_files (
    tenant_id uuid NOT NULL,
    files bigint NOT NULL,
    size_bytes bigint NOT NULL
);
CREATE VIEW public.stored_files_by_tenant AS
 SELECT t.name AS tenant,
    COALESCE(s.files, (0)::bigint) AS files,
    COALESCE(s.size_bytes, (0)::bigint) AS size_bytes,
    t.max_stored_bytes,
    round(((s.size_bytes)::numeric / (NULLIF(t.max_stored_bytes, 0))::numeric), 4) AS used_ratio
   FROM (public.tenants t
     LEFT JOIN public.stored_files s ON ((s.tenant_id = t.id)));
COMMENT ON VIEW public.stored_files_by_tenant IS 'One row per tenant: the pictures that it brought and did not erase, their bytes, and what of its limit they are.';
CREATE TABLE public.uploads (
    object_key text NOT NULL,
    started_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL
);
CREATE TABLE public.usage_ledger (
    tenant_id uuid NOT NULL,
    day date NOT NULL,
    reserved numeric(18,6) DEFAULT 0 NOT NULL,
    settled numeric(18,6) DEFAULT 0 NOT NULL,
    jobs_accepted integer DEFAULT 0 NOT NULL,
    jobs_succeeded integer DEFAULT 0 NOT NULL,
    cost numeric(14,6) DEFAULT 0 NOT NULL,
    abandoned numeric(18,6) DEFAULT 0 NOT NULL
);
CREATE VIEW public.usage_by_tenant_day AS
 SELECT u.day,
    t.name AS tenant,
    u.jobs_accepted,
    u.jobs_succeeded,
    u.reserved AS reserved_megapixel_steps,
    u.settled AS settled_megapixel_steps,
    u.cost,
    u.abandoned AS abandoned_megapixel_steps
   FROM (public.usage_ledger u
     JOIN public.tenants t ON ((t.id = u.tenant_id)));
COMMENT ON VIEW public.usage_by_tenant_day IS 'One row per tenant and UTC day: megapixel-steps reserved by jobs under way, settled for stored images, and abandoned, which were done on images of canceled jobs that were never stored; and money, for the stored ones. Quotas count all three.';
CREATE TABLE public.webhook_attempts (
    delivery_id uuid NOT NULL,
    attempt integer NOT NULL,
    at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    status integer,
    error text,
    took_s double precision NOT NULL
);
CREATE TABLE public.webhook_deliveries (
    id uuid NOT NULL,
    endpoint_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    event text NOT NULL,
    job_id uuid,
    state text DEFAULT 'pending'::text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    due_at timestamp with time zone DEFAULT clock_timestamp(),
    claimed_until timestamp with time zone,
    attempts integer DEFAULT 0 NOT NULL,
    ended_at timestamp with time zone,
    CONSTRAINT webhook_deliveries_due_while_pending CHECK (((state = 'pending'::text) = (due_at IS NOT NULL))),
    CONSTRAINT webhook_deliveries_state_is_known CHECK ((state = ANY (ARRAY['pending'::text, 'delivered'::text, 'gone'::text, 'failed'::text])))
);
CREATE TABLE public.webhook_endpoints (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    url text NOT NULL,
    description text DEFAULT ''::text NOT NULL,
    events text[] NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    disabled_at timestamp with time zone,
    disabled_reason text,
    deleted_at timestamp with time zone,
    is_slow boolean DEFAULT false NOT NULL
);
CREATE TABLE public.webhook_secrets (
    id uuid NOT NULL,
    endpoint_id uuid NOT NULL,
    secret text NOT NULL,
    created_at timestamp with time zone DEFAULT clock_timestamp() NOT NULL,
    expires_at timestamp with time zone
);
CREATE VIEW public.webhooks_now AS
 SELECT t.name AS tenant,
    e.id AS endpoint_id,
    e.disabled_at,
    e.disabled_reason,
    d.pending,
    d.oldest_pending_s,
    a.at AS last_attempt_at,
    a.status AS last_status,
    a.error AS last_error,
    a.took_s AS last_took_s,
    e.is_slow
   FROM (((public.webhook_endpoints e
     JOIN public.tenants t ON ((t.id = e.tenant_id)))
     LEFT JOIN LATERAL ( SELECT count(*) AS pending,
            round(EXTRACT(epoch FROM (clock_timestamp() - min(webhook_deliveries.created_at))), 1) AS oldest_pending_s
           FROM public.webhook_deliveries
          WHERE ((webhook_deliveries.endpoint_id = e.id) AND (webhook_deliveries.state = 'pending'::text))) d ON (true))
     LEFT JOIN LATERAL ( SELECT wa.at,
            wa.status,
            wa.error,
            wa.took_s
           FROM (public.webhook_attempts wa
             JOIN public.webhook_deliveries wd ON ((wd.id = wa.delivery_id)))
          WHERE (wd.endpoint_id = e.id)
          ORDER BY wd.id DESC, wa.attempt DESC
         LIMIT 1) a ON (true))
  WHERE (e.deleted_at IS NULL);
COMMENT ON VIEW public.webhooks_now IS 'One row per webhook endpoint that is not deleted: what waits for it, since when, and how the last attempt ended.';
ALTER TABLE ONLY public.audit_events ATTACH PARTITION public.audit_events_2026_11 FOR VALUES FROM ('2026-11-01 00:00:00+00') TO ('2026-12-01 00:00:00+00');
ALTER TABLE ONLY public.audit_events ATTACH PARTITION public.audit_events_default DEFAULT;
INSERT INTO public.alembic_version VALUES ('0012');
INSERT INTO public.api_keys VALUES ('01a22c47-03c5-7814-8cf7-2ddde77d9d94', '01a22c47-03ba-79bb-8112-f71377c1d253', 'Uf20zriDtCql', 'k', '\x964bf12f962f15b12bb96ff70d57e170ff750f1410a9db68c503e3ce9a526d3c', '2026-11-30 11:46:21.254168+00', NULL, NULL, '{generate,read}', NULL);
INSERT INTO public.artifacts VALUES ('01a22c47-04c5-7b29-b53b-c5a1a862e8ee', '01a22c47-03ba-79bb-8112-f71377c1d253', '01a22c47-03dc-7934-8da0-5b409f4e0cab', 0, 't/x/sha256/4a/4ae538afc271e95f228340854e8abc15ae13b46996393b4f19ece982d768a92e.png', 'image/png', 1000, 128, 128, '4ae538afc271e95f228340854e8abc15ae13b46996393b4f19ece982d768a92e', '4ae538afc271e95f228340854e8abc15ae13b46996393b4f19ece982d768a92e', '2026-11-30 11:46:21.510389+00', NULL);
INSERT INTO public.artifacts VALUES ('01a22c47-0523-7aa7-9bba-1f74aea8f045', '01a22c47-03ba-79bb-8112-f71377c1d253', '01a22c47-03dc-7934-8da0-5b409f4e0cab', 1, 't/x/sha256/23/23e8b8d1778ff8f41ff8cd357ea06b87679eb7847031b985b9806f5506937e1d.png', 'image/png', 1000, 128, 128, '23e8b8d1778ff8f41ff8cd357ea06b87679eb7847031b985b9806f5506937e1d', '23e8b8d1778ff8f41ff8cd357ea06b87679eb7847031b985b9806f5506937e1d', '2026-11-30 11:46:21.603642+00', NULL);
INSERT INTO public.attempts VALUES ('01a22c47-03dc-7934-8da0-5b409f4e0cab', 1, 'gpu0@here', 'cpu', '2026-11-30 11:46:21.425839+00', '2026-11-30 11:46:21.58958+00', 'rendered', NULL, NULL, 8, 0, 2, 1, 2, NULL, 1, 0.2, 0.6, 0.2, 'cpu-fp32', '{"torch_threads": 1}', 0, 0, NULL, 0, NULL);
INSERT INTO public.attempts VALUES ('01a22c47-056c-76bd-a491-38df53d30eaa', 1, 'gpu0@here', 'cpu', '2026-11-30 11:46:21.705027+00', '2026-11-30 11:46:21.729316+00', 'failed', 'failed', 'no', 0, 0, 0, 0, 0, NULL, 0, 0, 0, 0, NULL, NULL, 0, 0, NULL, 0, NULL);
INSERT INTO public.audit_chains VALUES ('01a22c47-03ba-79bb-8112-f71377c1d253', 15, '\xca0465920665825f2bc8122a17cf2fa05205485b823bd3916830acb88f42857f');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-03bd-7de5-b88b-73a8f06d0d7e', '2026-11-30 11:46:21.247604+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 1, 'tenant:record:created', 'tests', NULL, NULL, '{"tenant_id": "01a22c47-03ba-79bb-8112-f71377c1d253"}', '\x', '\xda25cbde726bdbf30a91ffa5105da3c03fc9a7d4de1a44af5bcfc78050addfcb');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-03c8-7fc3-936c-149260657330', '2026-11-30 11:46:21.260318+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 2, 'api-key:secret:issued', 'cli', NULL, NULL, '{"kid": "Uf20zriDtCql", "scopes": ["generate", "read"], "api_key_id": "01a22c47-03c5-7814-8cf7-2ddde77d9d94"}', '\xda25cbde726bdbf30a91ffa5105da3c03fc9a7d4de1a44af5bcfc78050addfcb', '\xd40f510e7dea8dcf5927d3ac17b1a30b58d89a378b0b395a92485e1c9e02e45d');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-03dc-7528-b260-731192b78f2a', '2026-11-30 11:46:21.300374+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 3, 'job:request:accepted', 'tests', '01a22c47-03dc-7934-8da0-5b409f4e0cab', NULL, '{"pool": "local", "seed": "7", "tier": "fast", "model": "pocket", "num_images": 2, "model_version": "1"}', '\xd40f510e7dea8dcf5927d3ac17b1a30b58d89a378b0b395a92485e1c9e02e45d', '\x4dc86305bc84bfaaa6fdfd6a1e95143c69c59e074143a8ce48d8f453ba459364');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-0478-7fcd-85bb-d9761a1bb293', '2026-11-30 11:46:21.440266+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 4, 'job:lease:taken', 'gpu0@here', '01a22c47-03dc-7934-8da0-5b409f4e0cab', 1, '{}', '\x4dc86305bc84bfaaa6fdfd6a1e95143c69c59e074143a8ce48d8f453ba459364', '\xc195667e61751128dd1bc0d23d313626cc9091dab4542d1c58022d3f50cac671');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-04ac-7c8e-b0e9-9b8fe5f892f8', '2026-11-30 11:46:21.485732+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 5, 'job:image:handed-off', 'gpu0@here', '01a22c47-03dc-7934-8da0-5b409f4e0cab', 1, '{"index": 0, "steps": 4, "fingerprint": "cpu-fp32", "device_seconds": 0.5}', '\xc195667e61751128dd1bc0d23d313626cc9091dab4542d1c58022d3f50cac671', '\x8e395e285b1b50fba34fd3e224fe4d2a7db7b44b5a58e9a5a5fb6415ee44525b');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-04e8-7ec6-bfaf-ee4c0e27d2fc', '2026-11-30 11:46:21.547626+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 6, 'job:image:stored', 'results', '01a22c47-03dc-7934-8da0-5b409f4e0cab', 1, '{"index": 0, "artifact_id": "01a22c47-04c5-7b29-b53b-c5a1a862e8ee", "pixels_sha256": "4ae538afc271e95f228340854e8abc15ae13b46996393b4f19ece982d768a92e", "content_sha256": "4ae538afc271e95f228340854e8abc15ae13b46996393b4f19ece982d768a92e"}', '\x8e395e285b1b50fba34fd3e224fe4d2a7db7b44b5a58e9a5a5fb6415ee44525b', '\xdd31e5c0eee77e053683979e914547ccb39e32adc684040bc5f6d37141cb2dac');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-0518-789f-a50d-5f1454156229', '2026-11-30 11:46:21.596256+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 7, 'job:image:handed-off', 'gpu0@here', '01a22c47-03dc-7934-8da0-5b409f4e0cab', 1, '{"index": 1, "steps": 4, "fingerprint": "cpu-fp32", "device_seconds": 0.5}', '\xdd31e5c0eee77e053683979e914547ccb39e32adc684040bc5f6d37141cb2dac', '\x1d0a0ef698140f2d75db02721b4503d68acd8de7acf2230584dae2529d70a1ad');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-053c-7372-887d-e53141e495fc', '2026-11-30 11:46:21.629329+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 8, 'job:image:stored', 'results', '01a22c47-03dc-7934-8da0-5b409f4e0cab', 1, '{"index": 1, "artifact_id": "01a22c47-0523-7aa7-9bba-1f74aea8f045", "pixels_sha256": "23e8b8d1778ff8f41ff8cd357ea06b87679eb7847031b985b9806f5506937e1d", "content_sha256": "23e8b8d1778ff8f41ff8cd357ea06b87679eb7847031b985b9806f5506937e1d"}', '\x1d0a0ef698140f2d75db02721b4503d68acd8de7acf2230584dae2529d70a1ad', '\x23fcd364ad00d0ce1db5ef027e7bad79c324b2f51e8c65eea7836f9fa995aab3');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-053d-7727-ae34-dbb1b2075bd4', '2026-11-30 11:46:21.631+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 9, 'job:state:succeeded', 'results', '01a22c47-03dc-7934-8da0-5b409f4e0cab', 1, '{"cost": "0.000667", "currency": "EUR", "device_seconds": 1.0}', '\x23fcd364ad00d0ce1db5ef027e7bad79c324b2f51e8c65eea7836f9fa995aab3', '\xf283669fc605280935c0c7ba4e6e05f0371e1db667288895f83fe75abb9fc52e');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-0544-796b-be1e-9ca3c43b4d05', '2026-11-30 11:46:21.639797+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 10, 'job:request:accepted', 'tests', '01a22c47-0543-78ca-8ef1-a1e89206704d', NULL, '{"pool": "local", "seed": "7", "tier": "fast", "model": "pocket", "num_images": 1, "model_version": "1"}', '\xf283669fc605280935c0c7ba4e6e05f0371e1db667288895f83fe75abb9fc52e', '\x38f0e265009facf246a7c623bb2f267b39500da226e81d7cef79ee2d20b8572a');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-0558-7240-86e5-ef3402414eeb', '2026-11-30 11:46:21.657575+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 11, 'job:request:accepted', 'tests', '01a22c47-0557-79a7-91f5-0b6637fc2c32', NULL, '{"pool": "local", "seed": "7", "tier": "fast", "model": "pocket", "num_images": 1, "model_version": "1"}', '\x38f0e265009facf246a7c623bb2f267b39500da226e81d7cef79ee2d20b8572a', '\xa5a0440092d021a99ceadb604d9e1c3c1ab6ca2333df34c6809a239fa10fab28');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-056d-77c9-92eb-a7ae79f16e8a', '2026-11-30 11:46:21.681369+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 12, 'job:request:accepted', 'tests', '01a22c47-056c-76bd-a491-38df53d30eaa', NULL, '{"pool": "local", "seed": "7", "tier": "fast", "model": "pocket", "num_images": 1, "model_version": "1"}', '\xa5a0440092d021a99ceadb604d9e1c3c1ab6ca2333df34c6809a239fa10fab28', '\xa413969fd204da04c0cbfc0698744bd47e5154c9937aac1d896841ad8fd95893');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-058c-7739-93fc-dea66187fe92', '2026-11-30 11:46:21.712214+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 13, 'job:lease:taken', 'gpu0@here', '01a22c47-056c-76bd-a491-38df53d30eaa', 1, '{}', '\xa413969fd204da04c0cbfc0698744bd47e5154c9937aac1d896841ad8fd95893', '\x7c527d280e9601a147670e8de59c90ec9eb9fa0e04f40643cced8b9bea0a7502');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-05b0-7bcd-805a-41a97975063b', '2026-11-30 11:46:21.745147+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 14, 'job:state:failed', 'gpu0@here', '01a22c47-056c-76bd-a491-38df53d30eaa', 1, '{"code": "unsupported"}', '\x7c527d280e9601a147670e8de59c90ec9eb9fa0e04f40643cced8b9bea0a7502', '\x1a140f53ea06068989b535f001cbe391cb69c1779227a949d7c1941bc92688fe');
INSERT INTO public.audit_events_2026_11 VALUES ('01a22c47-05c0-72c8-aebb-9790d6d9b4c9', '2026-11-30 11:46:21.767182+00', '01a22c47-03ba-79bb-8112-f71377c1d253', 15, 'webhook:endpoint:created', 'tests', NULL, NULL, '{"events": ["job.succeeded"], "endpoint_id": "None"}', '\x1a140f53ea06068989b535f001cbe391cb69c1779227a949d7c1941bc92688fe', '\xca0465920665825f2bc8122a17cf2fa05205485b823bd3916830acb88f42857f');
INSERT INTO public.files VALUES ('01a22c47-03d1-7484-9502-625b19ba0b6b', '01a22c47-03ba-79bb-8112-f71377c1d253', 't/f', 'RGB', 70, 1, 1, 'ab', '2026-11-30 11:46:21.26558+00', NULL);
INSERT INTO public.flows VALUES ('local', 'fast', '01a22c47-03ba-79bb-8112-f71377c1d253', 1796039184.787091, 2, 2, 2.5);
INSERT INTO public.images VALUES ('01a22c47-03dc-7934-8da0-5b409f4e0cab', 0, 7, 'stored', 1, '2026-11-30 11:46:21.453991+00', NULL, 4, 0.5, '01a22c47-04c5-7b29-b53b-c5a1a862e8ee', 4);
INSERT INTO public.images VALUES ('01a22c47-03dc-7934-8da0-5b409f4e0cab', 1, 8, 'stored', 1, '2026-11-30 11:46:21.560319+00', NULL, 4, 0.5, '01a22c47-0523-7aa7-9bba-1f74aea8f045', 4);
INSERT INTO public.images VALUES ('01a22c47-0543-78ca-8ef1-a1e89206704d', 0, 7, 'pending', NULL, NULL, NULL, 0, 0, NULL, 0);
INSERT INTO public.images VALUES ('01a22c47-0557-79a7-91f5-0b6637fc2c32', 0, 7, 'pending', NULL, NULL, NULL, 0, 0, NULL, 0);
INSERT INTO public.images VALUES ('01a22c47-056c-76bd-a491-38df53d30eaa', 0, 7, 'pending', NULL, NULL, NULL, 0, 0, NULL, 0);
INSERT INTO public.job_labels VALUES ('01a22c47-03ba-79bb-8112-f71377c1d253', '1023e18e-ddbc-3382-fcd8-db7e53b43e1a', '01a22c47-0557-79a7-91f5-0b6637fc2c32');
INSERT INTO public.jobs VALUES ('01a22c47-03dc-7934-8da0-5b409f4e0cab', '01a22c47-03ba-79bb-8112-f71377c1d253', NULL, 'succeeded', 'local', 'fast', 'pocket', '1', 'a red circle', '', 128, 128, 4, 4, 'ddim', 7, 2, 'png', 'fp32', 'best_effort', NULL, 1796039181.287091, '2026-11-30 11:46:21.287374+00', NULL, '2026-11-30 11:56:21.287372+00', '2026-11-30 11:46:21.416724+00', '2026-11-30 11:46:21.577208+00', NULL, '2026-11-30 11:46:21.615201+00', 1, 0, 'gpu0@here', NULL, NULL, NULL, 1, 0.000667, 'EUR', 0, NULL, false, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0.000000, '2026-11-30', NULL, NULL, false, NULL);
INSERT INTO public.jobs VALUES ('01a22c47-0543-78ca-8ef1-a1e89206704d', '01a22c47-03ba-79bb-8112-f71377c1d253', NULL, 'queued', 'local', 'fast', 'pocket', '1', 'a red circle', '', 128, 128, 4, 4, 'ddim', 7, 1, 'png', 'fp32', 'best_effort', NULL, 1796039182.287091, '2026-11-30 11:46:21.639639+00', NULL, '2026-11-30 11:56:21.639638+00', NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, NULL, NULL, 0, NULL, 'EUR', 2.5, NULL, false, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0.000000, '2026-11-30', NULL, NULL, false, NULL);
INSERT INTO public.jobs VALUES ('01a22c47-0557-79a7-91f5-0b6637fc2c32', '01a22c47-03ba-79bb-8112-f71377c1d253', NULL, 'queued', 'local', 'fast', 'pocket', '1', 'a red circle', '', 128, 128, 4, 4, 'ddim', 7, 1, 'png', 'fp32', 'best_effort', NULL, 1796039184.787091, '2026-11-30 11:46:21.657442+00', NULL, '2026-11-30 11:56:21.657441+00', NULL, NULL, NULL, NULL, 0, 0, NULL, NULL, NULL, NULL, 0, NULL, 'EUR', 0, NULL, false, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, '{"order": "7"}', NULL, 0.000000, '2026-11-30', NULL, NULL, false, NULL);
INSERT INTO public.jobs VALUES ('01a22c47-056c-76bd-a491-38df53d30eaa', '01a22c47-03ba-79bb-8112-f71377c1d253', NULL, 'failed', 'local', 'fast', 'pocket', '1', 'a red circle', '', 128, 128, 4, 4, 'ddim', 7, 1, 'png', 'fp32', 'best_effort', NULL, 1796039184.787091, '2026-11-30 11:46:21.681254+00', NULL, '2026-11-30 11:56:21.681252+00', '2026-11-30 11:46:21.693478+00', NULL, NULL, '2026-11-30 11:46:21.725686+00', 1, 0, 'gpu0@here', NULL, 'unsupported', 'no', 0, NULL, 'EUR', 0, NULL, false, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, 0.000000, '2026-11-30', NULL, NULL, false, NULL);
INSERT INTO public.stored_files VALUES ('01a22c47-03ba-79bb-8112-f71377c1d253', 1, 70);
INSERT INTO public.tenants VALUES ('01a22c47-03ba-79bb-8112-f71377c1d253', 'acme', '2026-11-30 11:46:21.244556+00', 1, NULL, NULL, NULL, NULL, NULL, NULL, NULL, NULL, false, NULL);
INSERT INTO public.usage_ledger VALUES ('01a22c47-03ba-79bb-8112-f71377c1d253', '2026-11-30', 0.000000, 0.000000, 4, 1, 0.000667, 0.000000);
INSERT INTO public.webhook_endpoints VALUES ('01a22c47-05b2-7912-b87c-1b42e60e266c', '01a22c47-03ba-79bb-8112-f71377c1d253', 'https://x.example', '', '{job.succeeded}', '2026-11-30 11:46:21.747034+00', NULL, NULL, NULL, false);
INSERT INTO public.webhook_secrets VALUES ('01a22c47-05ba-758c-89b0-158825138a4d', '01a22c47-05b2-7912-b87c-1b42e60e266c', 'whsec_x', '2026-11-30 11:46:21.757036+00', NULL);
INSERT INTO public.workers VALUES ('gpu0', 'local', 'cpu', 4, '2026-11-30 11:46:21.769403+00', '2026-11-30 11:46:21.769403+00', '{}', 15);
ALTER TABLE ONLY public.alembic_version
    ADD CONSTRAINT alembic_version_pkc PRIMARY KEY (version_num);
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_kid_key UNIQUE (kid);
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.artifacts
    ADD CONSTRAINT artifacts_one_per_image UNIQUE (job_id, index);
ALTER TABLE ONLY public.artifacts
    ADD CONSTRAINT artifacts_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.attempts
    ADD CONSTRAINT attempts_pkey PRIMARY KEY (job_id, attempt);
ALTER TABLE ONLY public.audit_chains
    ADD CONSTRAINT audit_chains_pkey PRIMARY KEY (chain_id);
ALTER TABLE ONLY public.audit_checkpoints
    ADD CONSTRAINT audit_checkpoints_pkey PRIMARY KEY (chain_id, seq);
ALTER TABLE ONLY public.audit_events
    ADD CONSTRAINT audit_events_pkey PRIMARY KEY (id, at);
ALTER TABLE ONLY public.audit_events_2026_11
    ADD CONSTRAINT audit_events_2026_11_pkey PRIMARY KEY (id, at);
ALTER TABLE ONLY public.audit_events_default
    ADD CONSTRAINT audit_events_default_pkey PRIMARY KEY (id, at);
ALTER TABLE ONLY public.fair_clocks
    ADD CONSTRAINT fair_clocks_pkey PRIMARY KEY (pool, tier);
ALTER TABLE ONLY public.files
    ADD CONSTRAINT files_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.flows
    ADD CONSTRAINT flows_pkey PRIMARY KEY (pool, tier, tenant_id);
ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_pkey PRIMARY KEY (tenant_id, key);
ALTER TABLE ONLY public.images
    ADD CONSTRAINT images_pkey PRIMARY KEY (job_id, index);
ALTER TABLE ONLY public.job_labels
    ADD CONSTRAINT job_labels_pkey PRIMARY KEY (tenant_id, label, job_id);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.learnt_costs
    ADD CONSTRAINT learnt_costs_pkey PRIMARY KEY (pool, model, width_px, height_px);
ALTER TABLE ONLY public.learnt_etas
    ADD CONSTRAINT learnt_etas_pkey PRIMARY KEY (pool, tier);
ALTER TABLE ONLY public.stored_files
    ADD CONSTRAINT stored_files_pkey PRIMARY KEY (tenant_id);
ALTER TABLE ONLY public.tenants
    ADD CONSTRAINT tenants_name_key UNIQUE (name);
ALTER TABLE ONLY public.tenants
    ADD CONSTRAINT tenants_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.uploads
    ADD CONSTRAINT uploads_pkey PRIMARY KEY (object_key);
ALTER TABLE ONLY public.usage_ledger
    ADD CONSTRAINT usage_ledger_pkey PRIMARY KEY (tenant_id, day);
ALTER TABLE ONLY public.webhook_attempts
    ADD CONSTRAINT webhook_attempts_pkey PRIMARY KEY (delivery_id, attempt);
ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT webhook_deliveries_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.webhook_endpoints
    ADD CONSTRAINT webhook_endpoints_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.webhook_secrets
    ADD CONSTRAINT webhook_secrets_pkey PRIMARY KEY (id);
ALTER TABLE ONLY public.workers
    ADD CONSTRAINT workers_pkey PRIMARY KEY (name);
CREATE INDEX api_keys_by_tenant ON public.api_keys USING btree (tenant_id);
CREATE INDEX artifacts_by_key ON public.artifacts USING btree (object_key);
CREATE INDEX artifacts_by_tenant_day ON public.artifacts USING btree (tenant_id, created_at);
CREATE INDEX audit_events_by_chain ON ONLY public.audit_events USING btree (chain_id, seq);
CREATE INDEX audit_events_2026_11_chain_id_seq_idx ON public.audit_events_2026_11 USING btree (chain_id, seq);
CREATE INDEX audit_events_by_job ON ONLY public.audit_events USING btree (job_id);
CREATE INDEX audit_events_2026_11_job_id_idx ON public.audit_events_2026_11 USING btree (job_id);
CREATE INDEX audit_events_default_chain_id_seq_idx ON public.audit_events_default USING btree (chain_id, seq);
CREATE INDEX audit_events_default_job_id_idx ON public.audit_events_default USING btree (job_id);
CREATE INDEX files_by_key ON public.files USING btree (object_key);
CREATE INDEX files_by_tenant ON public.files USING btree (tenant_id, id) WHERE (erased_at IS NULL);
CREATE UNIQUE INDEX files_live ON public.files USING btree (tenant_id, content_sha256) WHERE (erased_at IS NULL);
CREATE INDEX idempotency_keys_by_age ON public.idempotency_keys USING btree (created_at);
CREATE INDEX idempotency_keys_by_job ON public.idempotency_keys USING btree (job_id) WHERE (job_id IS NOT NULL);
CREATE INDEX images_by_artifact ON public.images USING btree (artifact_id) WHERE (artifact_id IS NOT NULL);
CREATE INDEX jobs_announced ON public.jobs USING btree (pool, tier, announced_at) WHERE ((state = 'queued'::text) AND (announced_at IS NOT NULL));
CREATE INDEX jobs_by_control_file ON public.jobs USING btree (control_file_id) WHERE (control_file_id IS NOT NULL);
CREATE INDEX jobs_by_init_file ON public.jobs USING btree (init_file_id) WHERE (init_file_id IS NOT NULL);
CREATE INDEX jobs_by_mask_file ON public.jobs USING btree (mask_file_id) WHERE (mask_file_id IS NOT NULL);
CREATE INDEX jobs_by_tenant ON public.jobs USING btree (tenant_id, id);
CREATE INDEX jobs_by_tenant_state ON public.jobs USING btree (tenant_id, state, id);
CREATE INDEX jobs_dead ON public.jobs USING btree (finished_at) WHERE (state = 'failed'::text);
CREATE INDEX jobs_inputs_asked ON public.jobs USING btree (pool, tier) WHERE ((state = 'queued'::text) AND (inputs_asked_at IS NOT NULL));
CREATE INDEX jobs_lacking_inputs ON public.jobs USING btree (pool, tier, release_tag, id) WHERE ((state = 'queued'::text) AND lacks_inputs);
CREATE INDEX jobs_lacking_inputs_by_tenant ON public.jobs USING btree (pool, tier, tenant_id, release_tag, id) WHERE ((state = 'queued'::text) AND lacks_inputs);
CREATE INDEX jobs_oldest ON public.jobs USING btree (pool, tier, accepted_at) WHERE (state = 'queued'::text);
CREATE INDEX jobs_ready ON public.jobs USING btree (pool, tier, release_tag, id) WHERE ((state = 'queued'::text) AND (announced_at IS NULL) AND (NOT lacks_inputs));
CREATE INDEX jobs_ready_by_tenant ON public.jobs USING btree (pool, tier, tenant_id, release_tag, id) WHERE ((state = 'queued'::text) AND (announced_at IS NULL) AND (NOT lacks_inputs));
CREATE INDEX jobs_replayed ON public.jobs USING btree (replay_of) WHERE (replay_of IS NOT NULL);
CREATE UNIQUE INDEX jobs_requeued ON public.jobs USING btree (requeue_of) WHERE (requeue_of IS NOT NULL);
CREATE INDEX jobs_run_by ON public.jobs USING btree (run_by) WHERE ((state = 'queued'::text) AND (run_by IS NOT NULL));
CREATE INDEX jobs_running ON public.jobs USING btree (pool, tier) WHERE (state = 'running'::text);
CREATE INDEX jobs_start_by ON public.jobs USING btree (start_by) WHERE ((state = 'queued'::text) AND (attempt = 0));
CREATE INDEX jobs_storing ON public.jobs USING btree (store_by) WHERE (state = 'storing'::text);
CREATE INDEX jobs_succeeded ON public.jobs USING btree (finished_at) WHERE (state = 'succeeded'::text);
CREATE INDEX uploads_by_age ON public.uploads USING btree (started_at);
CREATE INDEX webhook_deliveries_by_age ON public.webhook_deliveries USING btree (created_at);
CREATE INDEX webhook_deliveries_by_endpoint ON public.webhook_deliveries USING btree (endpoint_id, id);
CREATE INDEX webhook_deliveries_by_job ON public.webhook_deliveries USING btree (job_id) WHERE (state = 'pending'::text);
CREATE INDEX webhook_deliveries_claimed ON public.webhook_deliveries USING btree (endpoint_id, claimed_until) WHERE (claimed_until IS NOT NULL);
CREATE INDEX webhook_deliveries_due ON public.webhook_deliveries USING btree (endpoint_id, due_at) WHERE (state = 'pending'::text);
CREATE INDEX webhook_deliveries_of_job ON public.webhook_deliveries USING btree (job_id) WHERE (job_id IS NOT NULL);
CREATE INDEX webhook_endpoints_by_tenant ON public.webhook_endpoints USING btree (tenant_id);
CREATE INDEX webhook_endpoints_live ON public.webhook_endpoints USING btree (tenant_id) WHERE ((disabled_at IS NULL) AND (deleted_at IS NULL));
CREATE INDEX webhook_secrets_by_endpoint ON public.webhook_secrets USING btree (endpoint_id);
CREATE INDEX workers_by_pool ON public.workers USING btree (pool, seen_at);
ALTER INDEX public.audit_events_by_chain ATTACH PARTITION public.audit_events_2026_11_chain_id_seq_idx;
ALTER INDEX public.audit_events_by_job ATTACH PARTITION public.audit_events_2026_11_job_id_idx;
ALTER INDEX public.audit_events_pkey ATTACH PARTITION public.audit_events_2026_11_pkey;
ALTER INDEX public.audit_events_by_chain ATTACH PARTITION public.audit_events_default_chain_id_seq_idx;
ALTER INDEX public.audit_events_by_job ATTACH PARTITION public.audit_events_default_job_id_idx;
ALTER INDEX public.audit_events_pkey ATTACH PARTITION public.audit_events_default_pkey;
CREATE TRIGGER audit_link BEFORE INSERT ON public.audit_events FOR EACH ROW EXECUTE FUNCTION public.audit_link();
CREATE TRIGGER audit_no_change BEFORE DELETE OR UPDATE ON public.audit_events FOR EACH ROW EXECUTE FUNCTION public.audit_refuse();
CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON public.audit_events FOR EACH STATEMENT EXECUTE FUNCTION public.audit_refuse();
CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON public.audit_events_2026_11 FOR EACH STATEMENT EXECUTE FUNCTION public.audit_refuse();
CREATE TRIGGER audit_no_truncate BEFORE TRUNCATE ON public.audit_events_default FOR EACH STATEMENT EXECUTE FUNCTION public.audit_refuse();
CREATE TRIGGER files_are_counted AFTER INSERT OR UPDATE OF erased_at ON public.files FOR EACH ROW EXECUTE FUNCTION public.count_stored_files();
CREATE TRIGGER flows_count_accepted AFTER INSERT ON public.jobs FOR EACH ROW WHEN ((new.state = 'queued'::text)) EXECUTE FUNCTION public.flows_count_queued();
CREATE TRIGGER flows_count_moved AFTER UPDATE OF state ON public.jobs FOR EACH ROW WHEN (((old.state = 'queued'::text) <> (new.state = 'queued'::text))) EXECUTE FUNCTION public.flows_count_queued();
CREATE TRIGGER job_labels_added AFTER INSERT ON public.jobs FOR EACH ROW WHEN ((new.metadata IS NOT NULL)) EXECUTE FUNCTION public.job_labels_follow();
CREATE TRIGGER job_labels_changed AFTER UPDATE OF metadata ON public.jobs FOR EACH ROW WHEN ((new.metadata IS DISTINCT FROM old.metadata)) EXECUTE FUNCTION public.job_labels_follow();
CREATE TRIGGER job_labels_removed AFTER DELETE ON public.jobs FOR EACH ROW WHEN ((old.metadata IS NOT NULL)) EXECUTE FUNCTION public.job_labels_follow();
CREATE TRIGGER jobs_mark_lacking_inputs BEFORE INSERT ON public.jobs FOR EACH ROW WHEN (((new.init_file_id IS NOT NULL) OR (new.control_file_id IS NOT NULL))) EXECUTE FUNCTION public.jobs_mark_lacking_inputs();
ALTER TABLE ONLY public.api_keys
    ADD CONSTRAINT api_keys_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.artifacts
    ADD CONSTRAINT artifacts_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id);
ALTER TABLE ONLY public.artifacts
    ADD CONSTRAINT artifacts_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.attempts
    ADD CONSTRAINT attempts_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id);
ALTER TABLE ONLY public.files
    ADD CONSTRAINT files_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.flows
    ADD CONSTRAINT flows_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id);
ALTER TABLE ONLY public.idempotency_keys
    ADD CONSTRAINT idempotency_keys_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.images
    ADD CONSTRAINT images_artifact_id_fkey FOREIGN KEY (artifact_id) REFERENCES public.artifacts(id);
ALTER TABLE ONLY public.images
    ADD CONSTRAINT images_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_api_key_id_fkey FOREIGN KEY (api_key_id) REFERENCES public.api_keys(id);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_control_file_id_fkey FOREIGN KEY (control_file_id) REFERENCES public.files(id);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_init_file_id_fkey FOREIGN KEY (init_file_id) REFERENCES public.files(id);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_mask_file_id_fkey FOREIGN KEY (mask_file_id) REFERENCES public.files(id);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_replay_of_fkey FOREIGN KEY (replay_of) REFERENCES public.jobs(id);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_requeue_of_fkey FOREIGN KEY (requeue_of) REFERENCES public.jobs(id);
ALTER TABLE ONLY public.jobs
    ADD CONSTRAINT jobs_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.stored_files
    ADD CONSTRAINT stored_files_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.usage_ledger
    ADD CONSTRAINT usage_ledger_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.webhook_attempts
    ADD CONSTRAINT webhook_attempts_delivery_id_fkey FOREIGN KEY (delivery_id) REFERENCES public.webhook_deliveries(id) ON DELETE CASCADE;
ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT webhook_deliveries_endpoint_id_fkey FOREIGN KEY (endpoint_id) REFERENCES public.webhook_endpoints(id);
ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT webhook_deliveries_job_id_fkey FOREIGN KEY (job_id) REFERENCES public.jobs(id);
ALTER TABLE ONLY public.webhook_deliveries
    ADD CONSTRAINT webhook_deliveries_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.webhook_endpoints
    ADD CONSTRAINT webhook_endpoints_tenant_id_fkey FOREIGN KEY (tenant_id) REFERENCES public.tenants(id);
ALTER TABLE ONLY public.webhook_secrets
    ADD CONSTRAINT webhook_secrets_endpoint_id_fkey FOREIGN KEY (endpoint_id) REFERENCES public.webhook_endpoints(id);
ALTER TABLE public.jobs ENABLE ROW LEVEL SECURITY;
CREATE POLICY jobs_of_everybody ON public.jobs USING (true) WITH CHECK (true);
CREATE POLICY jobs_under_way ON public.jobs AS RESTRICTIVE TO darkroom_worker USING (((finished_at IS NULL) OR (finished_at > (now() - '01:00:00'::interval)))) WITH CHECK (true);
GRANT USAGE ON SCHEMA public TO darkroom_app;
GRANT USAGE ON SCHEMA public TO darkroom_auditor;
REVOKE ALL ON FUNCTION public.audit_ensure_partitions(months_ahead integer) FROM PUBLIC;
GRANT ALL ON FUNCTION public.audit_ensure_partitions(months_ahead integer) TO darkroom_app;
REVOKE ALL ON FUNCTION public.audit_prune_month(month date, actor text, more_facts jsonb) FROM PUBLIC;
REVOKE ALL ON FUNCTION public.audit_verify(chain text) FROM PUBLIC;
GRANT ALL ON FUNCTION public.audit_verify(chain text) TO darkroom_app;
GRANT ALL ON FUNCTION public.audit_verify(chain text) TO darkroom_auditor;
REVOKE ALL ON FUNCTION public.audit_verify_since(since timestamp with time zone, chain text) FROM PUBLIC;
GRANT ALL ON FUNCTION public.audit_verify_since(since timestamp with time zone, chain text) TO darkroom_app;
GRANT ALL ON FUNCTION public.audit_verify_since(since timestamp with time zone, chain text) TO darkroom_auditor;
GRANT SELECT,INSERT,UPDATE ON TABLE public.api_keys TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.artifacts TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.attempts TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.tenants TO darkroom_app;
GRANT SELECT ON TABLE public.audit_chain_status TO darkroom_app;
GRANT SELECT ON TABLE public.audit_chain_status TO darkroom_auditor;
GRANT INSERT ON TABLE public.audit_events TO darkroom_app;
GRANT SELECT ON TABLE public.audit_log TO darkroom_app;
GRANT SELECT ON TABLE public.audit_log TO darkroom_auditor;
GRANT SELECT,INSERT,UPDATE ON TABLE public.jobs TO darkroom_app;
GRANT SELECT ON TABLE public.dead_letters TO darkroom_app;
GRANT SELECT ON TABLE public.dead_letters TO darkroom_auditor;
GRANT SELECT,INSERT,UPDATE ON TABLE public.fair_clocks TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.files TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.flows TO darkroom_app;
GRANT SELECT ON TABLE public.flows_now TO darkroom_app;
GRANT SELECT ON TABLE public.flows_now TO darkroom_auditor;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.idempotency_keys TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.images TO darkroom_app;
GRANT SELECT ON TABLE public.images_by_tenant_day TO darkroom_app;
GRANT SELECT ON TABLE public.images_by_tenant_day TO darkroom_auditor;
GRANT SELECT ON TABLE public.job_history TO darkroom_app;
GRANT SELECT ON TABLE public.job_history TO darkroom_auditor;
GRANT SELECT ON TABLE public.job_labels TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.learnt_costs TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.learnt_etas TO darkroom_app;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.workers TO darkroom_app;
GRANT SELECT ON TABLE public.queue_now TO darkroom_app;
GRANT SELECT ON TABLE public.queue_now TO darkroom_auditor;
GRANT SELECT,INSERT,UPDATE ON TABLE public.stored_files TO darkroom_app;
GRANT SELECT ON TABLE public.stored_files_by_tenant TO darkroom_app;
GRANT SELECT ON TABLE public.stored_files_by_tenant TO darkroom_auditor;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.uploads TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.usage_ledger TO darkroom_app;
GRANT SELECT ON TABLE public.usage_by_tenant_day TO darkroom_app;
GRANT SELECT ON TABLE public.usage_by_tenant_day TO darkroom_auditor;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.webhook_attempts TO darkroom_app;
GRANT SELECT,INSERT,DELETE,UPDATE ON TABLE public.webhook_deliveries TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.webhook_endpoints TO darkroom_app;
GRANT SELECT,INSERT,UPDATE ON TABLE public.webhook_secrets TO darkroom_app;
GRANT SELECT ON TABLE public.webhooks_now TO darkroom_app;
GRANT SELECT ON TABLE public.webhooks_now TO darkroom_auditor;
