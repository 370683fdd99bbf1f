"""Learn what jobs take: device seconds per row and step, and the error of estimated ends.

Device seconds are learnt for each model and size. Workers add what they measured with their
heartbeat, the sweeper adds the ended jobs that it sees; so no row is written once for every image.
`policy.prediction` decides what is made of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import func, select, text
from sqlalchemy.orm import Session

from models.database import statement_time
from models.tables import Job, LearntCost, LearntEta
from policy.states import JobState

MEMORY = 200  # images: a mean never weighs the past more than that, so it follows a change
# Pool and capacity class as policy.workers.class_key names them, model, width_px, height_px
CostKey = tuple[str, str, int, int]

_OBSERVE = text(
    """
    INSERT INTO learnt_costs AS c (pool, model, width_px, height_px, row_step_s, fixed_s, observed)
        VALUES (:pool, :model, :width_px, :height_px, :row_step_s, :fixed_s, :images)
    ON CONFLICT (pool, model, width_px, height_px) DO UPDATE SET
        row_step_s = c.row_step_s + (excluded.row_step_s - c.row_step_s)
            * excluded.observed / (least(c.observed, :memory) + excluded.observed),
        fixed_s = c.fixed_s + (excluded.fixed_s - c.fixed_s)
            * excluded.observed / (least(c.observed, :memory) + excluded.observed),
        observed = least(c.observed + excluded.observed, 1000000000)
    """
)


@dataclass
class ImageTimings:
    """Measured images of one model and size, added up."""

    images: int = 0
    row_steps: float = 0.0
    denoise_s: float = 0.0
    fixed_s: float = 0.0

    def add(self, other: "ImageTimings") -> None:
        """Add the other's sums to these."""
        self.images += other.images
        self.row_steps += other.row_steps
        self.denoise_s += other.denoise_s
        self.fixed_s += other.fixed_s


@dataclass(frozen=True)
class SucceededJob:
    """A job that succeeded: how long it took from accept, beside the first guess.

    waited_s: until it was started first.  previewed_s: until its first preview; None: it had none.
    promised_s: within which nine of ten such jobs were to end; None: nobody said.
    """

    pool: str
    tier: str
    guessed_s: float
    taken_s: float
    finished_at: datetime
    waited_s: float
    previewed_s: float | None
    promised_s: float | None


def observe(session: Session, seen: Mapping[CostKey, ImageTimings]) -> None:
    """Add the measurements since the last call."""
    # In the same order in every worker, so that no two deadlock.
    for (pool, model, width_px, height_px), sums in sorted(seen.items()):
        if sums.images and sums.row_steps:
            values = {
                "pool": pool,
                "model": model,
                "width_px": width_px,
                "height_px": height_px,
                "row_step_s": sums.denoise_s / sums.row_steps,
                "fixed_s": sums.fixed_s / sums.images,
                "images": sums.images,
                "memory": MEMORY,
            }
            session.execute(_OBSERVE, values)


def cost_of(session: Session, key: CostKey) -> LearntCost | None:
    """Read what was learnt of a model and size; None if nothing was."""
    return session.get(LearntCost, key)


def eta_of(session: Session, *, pool: str, tier: str) -> LearntEta | None:
    """Read how far estimated ends are off in (pool, tier); None if no job has ended yet."""
    return session.get(LearntEta, (pool, tier))


def newly_ended(session: Session, *, most: int = 500) -> Sequence[SucceededJob]:
    """List jobs that succeeded since the newest one that was learnt from, oldest first.

    At first those of the last hour.
    """
    since = session.scalar(select(func.max(LearntEta.learnt_until)))
    taken_s = func.extract("epoch", Job.finished_at - Job.accepted_at)
    waited_s = func.extract("epoch", Job.started_at - Job.accepted_at)
    previewed_s = func.extract("epoch", Job.first_preview_at - Job.accepted_at)
    columns = (Job.pool, Job.tier, Job.eta_raw_s, taken_s, Job.finished_at)
    query = select(*columns, waited_s, previewed_s, Job.eta_p90_s).where(
        Job.finished_at > (since if since is not None else statement_time() - timedelta(hours=1)),
        # `finished_at` is older than its commit.
        Job.finished_at < statement_time() - timedelta(seconds=2),
        Job.state == JobState.SUCCEEDED,
        Job.eta_raw_s > 0,
    )
    rows = session.execute(query.order_by(Job.finished_at).limit(most))
    return [
        SucceededJob(
            pool,
            tier,
            guessed_s,
            float(taken),
            at,
            waited_s=float(waited or 0.0),
            previewed_s=None if previewed is None else float(previewed),
            promised_s=promised,
        )
        for pool, tier, guessed_s, taken, at, waited, previewed, promised in rows
        if guessed_s and at
    ]


def learn_eta(session: Session, ended: SucceededJob, *, ratio_p50: float, ratio_p90: float) -> None:
    """Note the quantiles of actual / guessed as they are after `ended`."""
    row = session.get(LearntEta, (ended.pool, ended.tier))
    if row is None:
        row = LearntEta(pool=ended.pool, tier=ended.tier, observed=0)
        session.add(row)
    row.ratio_p50 = ratio_p50
    row.ratio_p90 = ratio_p90
    row.observed += 1
    row.learnt_until = ended.finished_at
