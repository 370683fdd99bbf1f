"""Count how many jobs met their tier's objectives, in buckets of five minutes.

The sweeper counts the newest buckets again and again from the rows of jobs, by the instant at which
each ended, and writes what it finds. So a bucket that is counted twice is right, and one that
nobody counted for a while is counted later. The view `slo_attainment` adds buckets up.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import text
from sqlalchemy.orm import Session

from policy.failures import FAILURES
from policy.fleet import Tier

BUCKET = timedelta(minutes=5)
COUNT_BACK = timedelta(minutes=10)  # a job's `finished_at` is older than its commit
MOST_BACK = timedelta(days=3)  # after a time without a sweeper
KEPT_FOR = timedelta(days=35)

_OURS = sorted(str(code) for code, failure in FAILURES.items() if failure.is_ours)

# `ended` is read through the partial indexes of ended jobs, one for each state.
_COUNT = text(
    """
    WITH bounds AS (
        SELECT date_bin('5 minutes', greatest(
            clock_timestamp() - CAST(:most_back AS interval),
            least(clock_timestamp() - CAST(:count_back AS interval),
                  coalesce((SELECT max(bucket) FROM slo_counts), '-infinity'))
        ), TIMESTAMPTZ '2000-01-01 00:00:00+00') AS since
    ), ended AS (
        SELECT tier, state, accepted_at, finished_at, eta_p90_s, first_preview_at FROM jobs
        WHERE state = 'succeeded' AND finished_at >= (SELECT since FROM bounds)
        UNION ALL
        SELECT tier, state, accepted_at, finished_at, eta_p90_s, first_preview_at FROM jobs
        WHERE state = 'failed' AND finished_at >= (SELECT since FROM bounds)
            AND failure_code = ANY(:ours)
        UNION ALL
        SELECT tier, state, accepted_at, finished_at, eta_p90_s, first_preview_at FROM jobs
        WHERE state = 'expired' AND finished_at >= (SELECT since FROM bounds)
    ), tiers AS (
        SELECT * FROM unnest(
            CAST(:tiers AS text[]), CAST(:first_preview_s AS double precision[]),
            CAST(:final_s AS double precision[])) AS t (tier, first_preview_s, final_s)
    ), met AS (
        SELECT e.tier, date_bin('5 minutes', e.finished_at, TIMESTAMPTZ '2000-01-01 00:00:00+00')
                   AS bucket,
               o.objective, o.is_met
        FROM ended e JOIN tiers t ON t.tier = e.tier
        CROSS JOIN LATERAL (VALUES
            ('success', e.state = 'succeeded'),
            ('final', CASE WHEN e.state = 'succeeded' THEN
                extract(epoch FROM e.finished_at - e.accepted_at) <= t.final_s END),
            ('eta', CASE WHEN e.state = 'succeeded' AND e.eta_p90_s IS NOT NULL THEN
                extract(epoch FROM e.finished_at - e.accepted_at) <= e.eta_p90_s END),
            ('first_preview', CASE WHEN e.first_preview_at IS NOT NULL THEN
                extract(epoch FROM e.first_preview_at - e.accepted_at) <= t.first_preview_s END)
        ) AS o (objective, is_met)
        WHERE o.is_met IS NOT NULL
    ), counted AS (
        SELECT m.tier, m.objective, m.bucket, count(*) FILTER (WHERE m.is_met) AS good,
               count(*) AS total
        FROM met m GROUP BY m.tier, m.objective, m.bucket
    )
    INSERT INTO slo_counts AS s (tier, objective, bucket, good, total)
    SELECT tier, objective, bucket, good, total FROM counted
    ON CONFLICT (tier, objective, bucket) DO UPDATE
        SET good = excluded.good, total = excluded.total
        WHERE (s.good, s.total) <> (excluded.good, excluded.total)
    """
)
_TARGETS = text(
    """
    INSERT INTO slo_targets AS s (tier, objective, target)
    SELECT * FROM unnest(
        CAST(:tiers AS text[]), CAST(:objectives AS text[]), CAST(:targets AS double precision[]))
    ON CONFLICT (tier, objective) DO UPDATE SET target = excluded.target
        WHERE s.target <> excluded.target
    """
)
_OTHERS = text("DELETE FROM slo_targets WHERE NOT tier = ANY(:tiers)")
_ATTAINMENT = text("SELECT tier, objective, target, span, good, total FROM slo_attainment")


@dataclass(frozen=True)
class Attainment:
    """How many of a tier's jobs met an objective within the last `span`, such as `1h`."""

    tier: str
    objective: str
    target: float
    span: str
    good: int
    total: int

    @property
    def ratio(self) -> float:
        """Return the part that met it; 1 where there was none."""
        return self.good / self.total if self.total else 1.0


def count(session: Session, tiers: Mapping[str, Tier]) -> None:
    """Count the jobs that ended since the newest bucket, and keep the objectives they had."""
    values = {
        "most_back": MOST_BACK,
        "count_back": COUNT_BACK,
        "ours": _OURS,
        "tiers": list(tiers),
        "first_preview_s": [tier.first_preview_s for tier in tiers.values()],
        "final_s": [tier.final_s for tier in tiers.values()],
    }
    session.execute(_COUNT, values)
    targets = [
        (name, objective, target)
        for name, tier in tiers.items()
        for objective, target in tier.slo.targets().items()
    ]
    names, objectives, shares = (list(column) for column in zip(*targets, strict=True))
    session.execute(_TARGETS, {"tiers": names, "objectives": objectives, "targets": shares})
    session.execute(_OTHERS, {"tiers": list(tiers)})


def attainments(session: Session) -> Sequence[Attainment]:
    """Read how far every tier's objectives are met, over each span."""
    return [Attainment(*row) for row in session.execute(_ATTAINMENT)]


def forget_old(session: Session, *, limit: int = 10_000) -> int:
    """Remove counts of more than a month ago; return how many."""
    statement = text(
        """
        DELETE FROM slo_counts WHERE ctid = ANY(ARRAY(
            SELECT ctid FROM slo_counts WHERE bucket < clock_timestamp() - CAST(:kept AS interval)
            LIMIT :limit))
        """
    )
    done = session.execute(statement, {"kept": KEPT_FOR, "limit": limit})
    return int(done.rowcount)  # type: ignore[attr-defined]
