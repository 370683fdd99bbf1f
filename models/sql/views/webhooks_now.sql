-- One row per webhook endpoint that is not deleted: what waits for it, since when, and how the last
-- attempt ended.
CREATE OR REPLACE VIEW webhooks_now AS
SELECT t.name AS tenant, e.id AS endpoint_id, e.disabled_at, e.disabled_reason, d.pending,
       d.oldest_pending_s, a.at AS last_attempt_at, a.status AS last_status, a.error AS last_error,
       a.took_s AS last_took_s, e.is_slow
FROM webhook_endpoints e
JOIN tenants t ON t.id = e.tenant_id
LEFT JOIN LATERAL (
    SELECT count(*) AS pending,
           round(extract(epoch FROM clock_timestamp() - min(created_at)), 1) AS oldest_pending_s
    FROM webhook_deliveries WHERE endpoint_id = e.id AND state = 'pending'
) d ON true
LEFT JOIN LATERAL (
    SELECT wa.at, wa.status, wa.error, wa.took_s
    FROM webhook_attempts wa JOIN webhook_deliveries wd ON wd.id = wa.delivery_id
    WHERE wd.endpoint_id = e.id ORDER BY wd.id DESC, wa.attempt DESC LIMIT 1
) a ON true
WHERE e.deleted_at IS NULL
