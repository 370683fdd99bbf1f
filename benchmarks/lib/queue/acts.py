"""The acts on a queue that are timed."""

import time
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import text
from sqlalchemy.orm import Session

from app.live.forecast import QueueForecaster
from benchmarks.lib.queue.database import A_DAY_S, POOL, SLOTS, TIER, WORKER, Queue
from models import jobs, leases, listing, releasing, workers
from models.database import transaction
from models.listing import JobFilter
from policy.current import CurrentFleet
from policy.failures import FailureCode
from policy.release import ReleaseLimits

FREE = 8
PAGE = 21  # rows of a page of 20, and one more that tells whether there are others


def _do_nothing(queue: Queue, done: Any) -> None:
    """Leave the queue as the act left it."""


@dataclass(frozen=True)
class Act:
    """Something that is timed.

    group: the target that it counts for, if any.  ends: "rollback" or "commit"; "read": the end of
    the transaction belongs to it; "own": it has transactions of its own.  after: is not timed.
    """

    name: str
    group: str
    do: Callable[[Queue, Session], Any]
    ends: str = "rollback"
    after: Callable[[Queue, Any], None] = _do_nothing

    def run(self, queue: Queue) -> tuple[float, float]:
        """Return the seconds up to the end of the transaction, and with it."""
        started_at = time.perf_counter()
        if self.ends == "own":
            with Session(queue.app) as unused:
                done = self.do(queue, unused)
            before = time.perf_counter()
            after = before
        else:
            with Session(queue.app, expire_on_commit=False) as session:
                done = self.do(queue, session)
                before = time.perf_counter()
                if self.ends == "rollback":
                    session.rollback()
                else:
                    session.commit()
                after = time.perf_counter()
        self.after(queue, done)
        return before - started_at, after - started_at


def _claim(queue: Queue, session: Session) -> leases.Lease:
    lease = leases.take(session, queue.draw(), worker=WORKER, device="cpu", ttl_s=A_DAY_S)
    if lease is None:
        raise SystemExit("a waiting job was not given")
    return lease


def _end(queue: Queue, lease: leases.Lease) -> None:
    with transaction(queue.app) as session:
        leases.fail(session, lease, code=FailureCode.INTERNAL, detail="benchmark")


def _accept(queue: Queue, session: Session) -> uuid.UUID:
    return queue.accept(session).id


def _remember(queue: Queue, job_id: uuid.UUID) -> None:
    queue.waiting.append(job_id)


def _cancel(queue: Queue, session: Session) -> None:
    jobs.cancel(session, queue.draw(), tenant_id=queue.bulk, actor="benchmark")


def _refill(queue: Queue, _: Any) -> None:
    queue.refill()


def _renew(queue: Queue, session: Session) -> None:
    leases.renew(session, queue.held, worker=WORKER, ttl_s=A_DAY_S)


def _pick(
    *, free: int, only_bulk: bool = False, bulk_at_cap: bool = False
) -> Callable[[Queue, Session], int]:
    """Return what a release does in the database. free: images for which there is room."""

    def pick(queue: Queue, session: Session) -> int:
        workers.capacity(session, pool=POOL, silent_for_s=15)
        limits = ReleaseLimits(
            slots=SLOTS,
            limit_images=queue.in_hand + free,
            least_share=4,
            max_per_tenant=queue.of_bulk if bulk_at_cap else None,
        )
        tenant_id = queue.bulk if only_bulk else None
        picked = releasing.pick(session, pool=POOL, tier=TIER, limits=limits, tenant_id=tenant_id)
        if len(picked) < free:
            raise SystemExit(f"{len(picked)} jobs were released where there was room for {free}")
        return len(picked)

    return pick


def _page(
    *, is_deep: bool = False, state: str | None = None, rows: int = PAGE
) -> Callable[[Queue, Session], None]:
    """Return what reads a page of the bulk tenant's jobs."""

    def page(queue: Queue, session: Session) -> None:
        job_filter = JobFilter(state=state)
        if is_deep:
            assert queue.deep is not None
            job_filter = replace(job_filter, before=queue.deep)
        found = listing.page(session, job_filter, tenant_id=queue.bulk, limit=PAGE).jobs
        if len(found) != rows:
            raise SystemExit(f"a page of {len(found)} jobs where {rows} were expected")

    return page


def _queue_now(_: Queue, session: Session) -> None:
    session.execute(text("SELECT * FROM queue_now")).all()


def _forecast(queue: Queue, _: Session) -> None:
    """Ask a forecaster that remembers nothing: it reads everything anew."""
    refresher = ThreadPoolExecutor(max_workers=1)  # that nobody asks for anything
    forecaster = QueueForecaster(
        queue.app,
        CurrentFleet(queue.fleet),
        queue.gauge,
        queue.sweeper.release.limits,
        refresher,
        worker_silence_s=15,
    )
    forecaster.expect(queue.params, queue.bulk)


def _sweep_part(name: str) -> Callable[[Queue, Session], None]:
    return lambda queue, _: getattr(queue.sweeper, name)()


SWEEP_PARTS = (
    "_leases",
    "_deadlines",
    "_stores",
    "_releases",
    "_lost_messages",
    "_gauges",
    "_etas",
    "_orphans",
    "_audit_partitions",
    "_silent_workers",
    "_old_deliveries",
    "_old_idempotency_keys",
)
ACTS = (
    Act("claim", "claim", _claim, "commit", _end),
    Act("release at accept, room full", "release", _pick(free=0, only_bulk=True)),
    Act("release at accept, room for 8", "release", _pick(free=FREE, only_bulk=True)),
    Act("release, room for 8", "release", _pick(free=FREE)),
    Act("release, room for 8, bulk at its cap", "release", _pick(free=FREE, bulk_at_cap=True)),
    Act("release, room full", "release", _pick(free=0)),
    Act("accept", "", _accept, "commit", _remember),
    Act("cancel", "", _cancel, "commit", _refill),
    *(
        Act(f"sweep: {name.strip('_').replace('_', ' ')}", "sweep", _sweep_part(name), "own")
        for name in SWEEP_PARTS
    ),
    Act("sweep", "sweep", _sweep_part("sweep"), "own"),
    Act("list: first page", "list", _page(), "read"),
    Act("list: deep page", "list", _page(is_deep=True), "read"),
    Act("list: queued", "list", _page(state="queued"), "read"),
    Act("list: queued, deep page", "list", _page(is_deep=True, state="queued"), "read"),
    Act("list: succeeded, all of them older", "list", _page(state="succeeded"), "read"),
    Act("list: rejected, of which there are 5", "list", _page(state="rejected", rows=5), "read"),
    Act("queue_now", "", _queue_now, "read"),
    Act("forecaster", "", _forecast, "own"),
    Act("renew 64 leases", "", _renew, "commit"),
)
