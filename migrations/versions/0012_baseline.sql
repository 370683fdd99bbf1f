-- The tables as revisions 0001 to 0012 made them, with constraints, indexes, and the operator's rights.
--
-- Frozen: what changes a table later is a migration of its own. Functions, views and triggers stand
-- in models/sql.

CREATE TABLE audit_chains (
    chain_id text NOT NULL,
    last_seq bigint NOT NULL DEFAULT 0,
    last_hash bytea NOT NULL DEFAULT '\x'::bytea,
    PRIMARY KEY (chain_id)
);

CREATE TABLE audit_checkpoints (
    chain_id text NOT NULL,
    seq bigint NOT NULL,
    hash bytea NOT NULL,
    PRIMARY KEY (chain_id, seq)
);

CREATE TABLE audit_events (
    id uuid NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    chain_id text NOT NULL,
    seq bigint NOT NULL,
    event text NOT NULL,
    actor text NOT NULL,
    job_id uuid,
    attempt integer,
    facts jsonb NOT NULL,
    prev_hash bytea NOT NULL,
    hash bytea NOT NULL,
    PRIMARY KEY (id, at)
) PARTITION BY RANGE (at);
CREATE INDEX audit_events_by_chain ON audit_events (chain_id, seq);
CREATE INDEX audit_events_by_job ON audit_events (job_id);

CREATE TABLE fair_clocks (
    pool text NOT NULL,
    tier text NOT NULL,
    virtual_s double precision NOT NULL,
    PRIMARY KEY (pool, tier)
);

CREATE TABLE job_labels (
    tenant_id uuid NOT NULL,
    label uuid NOT NULL,
    job_id uuid NOT NULL,
    PRIMARY KEY (tenant_id, label, job_id)
);

CREATE TABLE learnt_costs (
    pool text NOT NULL,
    model text NOT NULL,
    width_px integer NOT NULL,
    height_px integer NOT NULL,
    row_step_s double precision NOT NULL,
    fixed_s double precision NOT NULL,
    observed integer NOT NULL,
    PRIMARY KEY (pool, model, width_px, height_px)
);

CREATE TABLE learnt_etas (
    pool text NOT NULL,
    tier text NOT NULL,
    ratio_p50 double precision NOT NULL,
    ratio_p90 double precision NOT NULL,
    observed integer NOT NULL,
    learnt_until timestamptz NOT NULL,
    PRIMARY KEY (pool, tier)
);

CREATE TABLE tenants (
    id uuid NOT NULL,
    name text NOT NULL,
    weight double precision NOT NULL DEFAULT 1,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    requests_per_minute integer,
    megapixel_steps_per_minute double precision,
    burst_megapixel_steps double precision,
    max_concurrent_jobs integer,
    daily_megapixel_steps numeric(18, 6),
    monthly_megapixel_steps numeric(18, 6),
    allowed_tiers text[],
    allowed_models text[],
    max_stored_bytes bigint,
    url_inputs boolean NOT NULL DEFAULT false,
    PRIMARY KEY (id),
    CONSTRAINT tenants_weight_is_positive CHECK (weight > 0),
    CONSTRAINT tenants_budget_has_rate_and_burst
        CHECK ((megapixel_steps_per_minute IS NULL) = (burst_megapixel_steps IS NULL)),
    CONSTRAINT tenants_limits_are_positive
        CHECK (least(requests_per_minute, megapixel_steps_per_minute, burst_megapixel_steps,
                     max_concurrent_jobs) > 0),
    CONSTRAINT tenants_quotas_are_not_negative
        CHECK (least(daily_megapixel_steps, monthly_megapixel_steps) >= 0),
    CONSTRAINT tenants_max_stored_bytes_is_not_negative CHECK (max_stored_bytes >= 0),
    UNIQUE (name)
);

CREATE TABLE uploads (
    object_key text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (object_key)
);
CREATE INDEX uploads_by_age ON uploads (started_at);

CREATE TABLE workers (
    name text NOT NULL,
    pool text NOT NULL,
    device text NOT NULL,
    slots integer NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    seen_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    silent_after_s double precision NOT NULL DEFAULT 15,
    facts jsonb NOT NULL,
    PRIMARY KEY (name)
);
CREATE INDEX workers_by_pool ON workers (pool, seen_at);

CREATE TABLE api_keys (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    kid text NOT NULL,
    name text NOT NULL,
    digest bytea NOT NULL,
    scopes text[] NOT NULL DEFAULT '{generate,read}',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz,
    revoked_at timestamptz,
    last_used_at timestamptz,
    PRIMARY KEY (id),
    CONSTRAINT api_keys_scopes_are_known
        CHECK (scopes <@ ARRAY['generate', 'read', 'admin'] AND scopes <> '{}'),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id),
    UNIQUE (kid)
);
CREATE INDEX api_keys_by_tenant ON api_keys (tenant_id);

CREATE TABLE files (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    object_key text NOT NULL,
    mode text NOT NULL,
    size_bytes bigint NOT NULL,
    width_px integer NOT NULL,
    height_px integer NOT NULL,
    content_sha256 text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    erased_at timestamptz,
    PRIMARY KEY (id),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id)
);
CREATE INDEX files_by_key ON files (object_key);
CREATE INDEX files_by_tenant ON files (tenant_id, id)
    WHERE erased_at IS NULL;
CREATE UNIQUE INDEX files_live ON files (tenant_id, content_sha256)
    WHERE erased_at IS NULL;

CREATE TABLE flows (
    pool text NOT NULL,
    tier text NOT NULL,
    tenant_id uuid NOT NULL,
    finish_tag double precision NOT NULL DEFAULT 0,
    queued_jobs integer NOT NULL DEFAULT 0,
    queued_images integer NOT NULL DEFAULT 0,
    queued_s double precision NOT NULL DEFAULT 0,
    PRIMARY KEY (pool, tier, tenant_id),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id)
);

CREATE TABLE stored_files (
    tenant_id uuid NOT NULL,
    files bigint NOT NULL,
    size_bytes bigint NOT NULL,
    PRIMARY KEY (tenant_id),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id)
);

CREATE TABLE usage_ledger (
    tenant_id uuid NOT NULL,
    day date NOT NULL,
    reserved numeric(18, 6) NOT NULL DEFAULT 0,
    settled numeric(18, 6) NOT NULL DEFAULT 0,
    abandoned numeric(18, 6) NOT NULL DEFAULT 0,
    jobs_accepted integer NOT NULL DEFAULT 0,
    jobs_succeeded integer NOT NULL DEFAULT 0,
    cost numeric(14, 6) NOT NULL DEFAULT 0,
    PRIMARY KEY (tenant_id, day),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id)
);

CREATE TABLE webhook_endpoints (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    url text NOT NULL,
    description text NOT NULL DEFAULT '',
    events text[] NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    disabled_at timestamptz,
    disabled_reason text,
    deleted_at timestamptz,
    is_slow boolean NOT NULL DEFAULT false,
    PRIMARY KEY (id),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id)
);
CREATE INDEX webhook_endpoints_by_tenant ON webhook_endpoints (tenant_id);
CREATE INDEX webhook_endpoints_live ON webhook_endpoints (tenant_id)
    WHERE disabled_at IS NULL AND deleted_at IS NULL;

CREATE TABLE jobs (
    id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    api_key_id uuid,
    state text NOT NULL DEFAULT 'queued',
    pool text NOT NULL,
    tier text NOT NULL,
    model text NOT NULL,
    model_alias text,
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
    init_file_id uuid,
    mask_file_id uuid,
    control_file_id uuid,
    strength double precision,
    adapters jsonb,
    precision text NOT NULL,
    determinism text NOT NULL,
    bucket_rows integer,
    release_tag double precision NOT NULL
        DEFAULT extract(epoch from clock_timestamp())::double precision,
    predicted_s double precision NOT NULL DEFAULT 0,
    eta_raw_s double precision,
    accepted_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    announced_at timestamptz,
    is_front boolean NOT NULL DEFAULT false,
    lacks_inputs boolean NOT NULL DEFAULT false,
    inputs_asked_at timestamptz,
    start_by timestamptz NOT NULL,
    run_within_s double precision,
    run_by timestamptz,
    started_at timestamptz,
    rendered_at timestamptz,
    store_by timestamptz,
    finished_at timestamptz,
    attempt integer NOT NULL DEFAULT 0,
    counted_attempts integer NOT NULL DEFAULT 0,
    worker text,
    lease_expires_at timestamptz,
    failure_code text,
    failure_detail text,
    warnings jsonb,
    requeue_of uuid,
    replay_of uuid,
    metadata jsonb,
    erased_at timestamptz,
    megapixel_steps numeric(18, 6) NOT NULL DEFAULT 0,
    usage_day date,
    device_seconds double precision NOT NULL DEFAULT 0,
    cost numeric(14, 6),
    currency text NOT NULL,
    PRIMARY KEY (id),
    CONSTRAINT jobs_state_is_known
        CHECK (state IN ('queued', 'running', 'storing',
                         'succeeded', 'failed', 'rejected', 'canceled', 'expired')),
    CONSTRAINT jobs_lease_while_running
        CHECK ((state = 'running') = (lease_expires_at IS NOT NULL)),
    CONSTRAINT jobs_store_by_while_storing CHECK ((state = 'storing') = (store_by IS NOT NULL)),
    CONSTRAINT jobs_finished_once_final
        CHECK ((state IN ('succeeded', 'failed', 'rejected', 'canceled', 'expired'))
               = (finished_at IS NOT NULL)),
    CONSTRAINT jobs_failure_has_code
        CHECK ((failure_code IS NULL) = (state NOT IN ('failed', 'rejected'))),
    CONSTRAINT jobs_bucket_when_reproducible
        CHECK ((determinism = 'reproducible') = (bucket_rows IS NOT NULL)),
    CONSTRAINT jobs_counts_are_positive
        CHECK (num_images >= 1 AND num_steps >= 1 AND seed >= 0),
    CONSTRAINT jobs_sides_are_positive CHECK (width_px >= 1 AND height_px >= 1),
    CONSTRAINT jobs_mask_needs_init CHECK (mask_file_id IS NULL OR init_file_id IS NOT NULL),
    CONSTRAINT jobs_strength_with_init CHECK ((init_file_id IS NULL) = (strength IS NULL)),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id),
    FOREIGN KEY (api_key_id) REFERENCES api_keys (id),
    FOREIGN KEY (init_file_id) REFERENCES files (id),
    FOREIGN KEY (mask_file_id) REFERENCES files (id),
    FOREIGN KEY (control_file_id) REFERENCES files (id),
    FOREIGN KEY (requeue_of) REFERENCES jobs (id),
    FOREIGN KEY (replay_of) REFERENCES jobs (id)
);
CREATE INDEX jobs_announced ON jobs (pool, tier, announced_at)
    WHERE state = 'queued' AND announced_at IS NOT NULL;
CREATE INDEX jobs_by_control_file ON jobs (control_file_id)
    WHERE control_file_id IS NOT NULL;
CREATE INDEX jobs_by_init_file ON jobs (init_file_id)
    WHERE init_file_id IS NOT NULL;
CREATE INDEX jobs_by_mask_file ON jobs (mask_file_id)
    WHERE mask_file_id IS NOT NULL;
CREATE INDEX jobs_by_tenant ON jobs (tenant_id, id);
CREATE INDEX jobs_by_tenant_state ON jobs (tenant_id, state, id);
CREATE INDEX jobs_dead ON jobs (finished_at)
    WHERE state = 'failed';
CREATE INDEX jobs_inputs_asked ON jobs (pool, tier)
    WHERE state = 'queued' AND inputs_asked_at IS NOT NULL;
CREATE INDEX jobs_lacking_inputs ON jobs (pool, tier, release_tag, id)
    WHERE state = 'queued' AND lacks_inputs;
CREATE INDEX jobs_lacking_inputs_by_tenant ON jobs (pool, tier, tenant_id, release_tag, id)
    WHERE state = 'queued' AND lacks_inputs;
CREATE INDEX jobs_oldest ON jobs (pool, tier, accepted_at)
    WHERE state = 'queued';
CREATE INDEX jobs_ready ON jobs (pool, tier, release_tag, id)
    WHERE state = 'queued' AND announced_at IS NULL AND NOT lacks_inputs;
CREATE INDEX jobs_ready_by_tenant ON jobs (pool, tier, tenant_id, release_tag, id)
    WHERE state = 'queued' AND announced_at IS NULL AND NOT lacks_inputs;
CREATE INDEX jobs_replayed ON jobs (replay_of)
    WHERE replay_of IS NOT NULL;
CREATE UNIQUE INDEX jobs_requeued ON jobs (requeue_of)
    WHERE requeue_of IS NOT NULL;
CREATE INDEX jobs_run_by ON jobs (run_by)
    WHERE state = 'queued' AND run_by IS NOT NULL;
CREATE INDEX jobs_running ON jobs (pool, tier)
    WHERE state = 'running';
CREATE INDEX jobs_start_by ON jobs (start_by)
    WHERE state = 'queued' AND attempt = 0;
CREATE INDEX jobs_storing ON jobs (store_by)
    WHERE state = 'storing';
CREATE INDEX jobs_succeeded ON jobs (finished_at)
    WHERE state = 'succeeded';

CREATE TABLE webhook_secrets (
    id uuid NOT NULL,
    endpoint_id uuid NOT NULL,
    secret text NOT NULL,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    expires_at timestamptz,
    PRIMARY KEY (id),
    FOREIGN KEY (endpoint_id) REFERENCES webhook_endpoints (id)
);
CREATE INDEX webhook_secrets_by_endpoint ON webhook_secrets (endpoint_id);

CREATE TABLE artifacts (
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
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    erased_at timestamptz,
    PRIMARY KEY (id),
    CONSTRAINT artifacts_one_per_image UNIQUE (job_id, index),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id),
    FOREIGN KEY (job_id) REFERENCES jobs (id)
);
CREATE INDEX artifacts_by_key ON artifacts (object_key);
CREATE INDEX artifacts_by_tenant_day ON artifacts (tenant_id, created_at);

CREATE TABLE attempts (
    job_id uuid NOT NULL,
    attempt integer NOT NULL,
    worker text NOT NULL,
    device text NOT NULL,
    started_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    ended_at timestamptz,
    outcome text NOT NULL,
    waste_class text,
    error text,
    resumed_steps integer NOT NULL DEFAULT 0,
    lost_steps integer NOT NULL DEFAULT 0,
    lost_cause text,
    snapshot_bytes bigint NOT NULL DEFAULT 0,
    snapshot_store text,
    steps integer NOT NULL DEFAULT 0,
    shared_steps integer NOT NULL DEFAULT 0,
    max_rows integer NOT NULL DEFAULT 0,
    max_images integer NOT NULL DEFAULT 0,
    mean_rows double precision NOT NULL DEFAULT 0,
    bucket_rows integer,
    device_seconds double precision NOT NULL DEFAULT 0,
    encode_s double precision NOT NULL DEFAULT 0,
    denoise_s double precision NOT NULL DEFAULT 0,
    decode_s double precision NOT NULL DEFAULT 0,
    fingerprint text,
    fingerprint_facts jsonb,
    PRIMARY KEY (job_id, attempt),
    FOREIGN KEY (job_id) REFERENCES jobs (id)
);

CREATE TABLE idempotency_keys (
    tenant_id uuid NOT NULL,
    key text NOT NULL,
    request_sha256 text NOT NULL,
    job_id uuid,
    answer jsonb,
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (tenant_id, key),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id),
    FOREIGN KEY (job_id) REFERENCES jobs (id)
);
CREATE INDEX idempotency_keys_by_age ON idempotency_keys (created_at);
CREATE INDEX idempotency_keys_by_job ON idempotency_keys (job_id)
    WHERE job_id IS NOT NULL;

CREATE TABLE webhook_deliveries (
    id uuid NOT NULL,
    endpoint_id uuid NOT NULL,
    tenant_id uuid NOT NULL,
    event text NOT NULL,
    job_id uuid,
    state text NOT NULL DEFAULT 'pending',
    created_at timestamptz NOT NULL DEFAULT clock_timestamp(),
    due_at timestamptz DEFAULT clock_timestamp(),
    claimed_until timestamptz,
    attempts integer NOT NULL DEFAULT 0,
    ended_at timestamptz,
    PRIMARY KEY (id),
    CONSTRAINT webhook_deliveries_state_is_known
        CHECK (state IN ('pending', 'delivered', 'gone', 'failed')),
    CONSTRAINT webhook_deliveries_due_while_pending
        CHECK ((state = 'pending') = (due_at IS NOT NULL)),
    FOREIGN KEY (endpoint_id) REFERENCES webhook_endpoints (id),
    FOREIGN KEY (tenant_id) REFERENCES tenants (id),
    FOREIGN KEY (job_id) REFERENCES jobs (id)
);
CREATE INDEX webhook_deliveries_by_age ON webhook_deliveries (created_at);
CREATE INDEX webhook_deliveries_by_endpoint ON webhook_deliveries (endpoint_id, id);
CREATE INDEX webhook_deliveries_by_job ON webhook_deliveries (job_id)
    WHERE state = 'pending';
CREATE INDEX webhook_deliveries_claimed ON webhook_deliveries (endpoint_id, claimed_until)
    WHERE claimed_until IS NOT NULL;
CREATE INDEX webhook_deliveries_due ON webhook_deliveries (endpoint_id, due_at)
    WHERE state = 'pending';
CREATE INDEX webhook_deliveries_of_job ON webhook_deliveries (job_id)
    WHERE job_id IS NOT NULL;

CREATE TABLE images (
    job_id uuid NOT NULL,
    index integer NOT NULL,
    seed bigint NOT NULL,
    state text NOT NULL DEFAULT 'pending',
    handed_off_attempt integer,
    handed_off_at timestamptz,
    snapshot_ref text,
    steps_done integer NOT NULL DEFAULT 0,
    reached_step integer NOT NULL DEFAULT 0,
    device_seconds double precision NOT NULL DEFAULT 0,
    artifact_id uuid,
    PRIMARY KEY (job_id, index),
    CONSTRAINT images_state_is_known CHECK (state IN ('pending', 'handed_off', 'stored')),
    CONSTRAINT images_stored_have_artifact
        CHECK ((state = 'stored') = (artifact_id IS NOT NULL)),
    CONSTRAINT images_handed_off_by_attempt
        CHECK ((state = 'pending') = (handed_off_attempt IS NULL)),
    FOREIGN KEY (job_id) REFERENCES jobs (id),
    FOREIGN KEY (artifact_id) REFERENCES artifacts (id)
);
CREATE INDEX images_by_artifact ON images (artifact_id)
    WHERE artifact_id IS NOT NULL;

CREATE TABLE webhook_attempts (
    delivery_id uuid NOT NULL,
    attempt integer NOT NULL,
    at timestamptz NOT NULL DEFAULT clock_timestamp(),
    status integer,
    error text,
    took_s double precision NOT NULL,
    PRIMARY KEY (delivery_id, attempt),
    FOREIGN KEY (delivery_id) REFERENCES webhook_deliveries (id) ON DELETE CASCADE
);

CREATE TABLE audit_events_default PARTITION OF audit_events DEFAULT;

-- Of jobs a worker sees those that are not over, or have not been for long: it needs their prompts,
-- and not everybody's of last year. Restrictive, and for the worker alone: a role that an operator
-- has made for himself sees what it saw.
CREATE POLICY jobs_of_everybody ON jobs USING (true) WITH CHECK (true);
CREATE POLICY jobs_under_way ON jobs AS RESTRICTIVE TO darkroom_worker
    USING (finished_at IS NULL OR finished_at > now() - interval '1 hour') WITH CHECK (true);
ALTER TABLE jobs ENABLE ROW LEVEL SECURITY;

GRANT USAGE ON SCHEMA public TO darkroom_app, darkroom_auditor;
GRANT INSERT ON audit_events TO darkroom_app;
GRANT SELECT ON job_labels TO darkroom_app;
GRANT SELECT, INSERT, UPDATE ON
    api_keys, artifacts, attempts, fair_clocks, files, flows, images, jobs, learnt_costs,
    learnt_etas, stored_files, tenants, usage_ledger, webhook_endpoints, webhook_secrets
    TO darkroom_app;
GRANT SELECT, INSERT, UPDATE, DELETE ON
    idempotency_keys, uploads, webhook_attempts, webhook_deliveries, workers
    TO darkroom_app;
