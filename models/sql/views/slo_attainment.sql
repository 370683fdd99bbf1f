-- Per tier, objective and span (5m, 30m, 1h, 6h, 3d, 30d, until now): the jobs that count, those
-- that met it, the part of them beside the one that the fleet aims for, and how fast the error
-- budget is spent: at a burn rate of 1 it lasts exactly as long as the objective's 30 days.
CREATE OR REPLACE VIEW slo_attainment AS
SELECT t.tier, t.objective, t.target, s.span,
       coalesce(c.good, 0) AS good, coalesce(c.total, 0) AS total,
       round((c.good / c.total::numeric), 6) AS attainment,
       round(((1 - c.good / c.total::numeric) / nullif(1 - t.target, 0)::numeric), 3) AS burn_rate
FROM slo_targets t
CROSS JOIN (VALUES
    ('5m', make_interval(mins => 5)), ('30m', make_interval(mins => 30)),
    ('1h', make_interval(hours => 1)), ('6h', make_interval(hours => 6)),
    ('3d', make_interval(days => 3)), ('30d', make_interval(days => 30))
) AS s (span, length)
LEFT JOIN LATERAL (
    SELECT sum(good)::bigint AS good, nullif(sum(total), 0)::bigint AS total FROM slo_counts
    WHERE tier = t.tier AND objective = t.objective
          AND bucket > clock_timestamp() - s.length - make_interval(mins => 5)
) c ON true
