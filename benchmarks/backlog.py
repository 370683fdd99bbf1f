"""Does a long queue make the queue slow? Every act on it at 1,000 and at 1,000,000 waiting jobs, on one Postgres, in turns.

    python -m benchmarks.backlog [--quick] [--explain]

Two databases on the server of a one-machine stack (64 MB of shared buffers), of which only the four services run. Both hold 50 tenants,
3 tiers, one pool and the same 64 running jobs; one tenant has 60 % of what waits, the others 8 jobs each or 8,000. Another tenth was
accepted before these and left the queue since the last vacuum, as happens to a queue that moves: their dead entries stand at the heads of
its indexes. One round does every act once in both, the small database first in one round and the large one in the next, so that noise
hits both. Ratio: of the medians; beside it the least and the greatest of five stretches of the run.

Claim, accept, cancel and renewal commit and are timed up to the commit, and with it. A claimed or canceled job is drawn from all that wait,
so its pages are as cold as they get, and another is accepted in its place, so both queues keep their length. Releases are rolled back, so
that they find the same room every time, and timed up to that: no commit, which costs the same in both, evens out their ratio. Sweeps, lists
and the gateway's reads are timed whole. No job of a sweep is due and all room is taken, so it looks at everything and finds nothing.
Autovacuum runs as it is configured.

--explain prints the plan of every statement of these acts in the large database.
"""

import argparse
import gc
import json
import random
import statistics
import sys
import tempfile
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from sqlalchemy import Engine, create_engine, event, make_url, select, text
from sqlalchemy.orm import Session

import migrations
from app.live.forecast import QueueForecaster
from benchmarks.serving.cells import percentile
from edges import telemetry
from edges.handoff import Gauge
from fleet.stack import Stack
from models import jobs, leases, listing, releasing, tenants, workers
from models.database import transaction
from models.listing import JobFilter
from models.tables import Job
from policy.catalog import resolve
from policy.failures import FailureCode
from policy.fleet import Fleet, parse_fleet
from policy.params import Resolved, Wish
from policy.release import ReleaseLimits
from policy.states import JobState
from settings import REPO, Settings
from tasks.roles.maintenance import build
from tasks.sweep import Sweeper

SMALL = 1_000
POOL, TIER, DRAWN_TIER = "local", "quality", "batch"  # of the fleet.toml of the repository; claims are drawn from a tier of their own
TENANTS, RUNNING, SLOTS, FREE = 50, 64, 64, 8
WORKER = "gpu0@benchmark"
A_DAY_S = 86_400.0
PAGE = 21  # rows of a page of 20, and one more that tells whether there are others
STRETCHES = 5
TARGETS = {"claim": 1.5, "release": 1.5, "sweep": 1.5, "list": 1.5}  # the worst ratio of each group of acts, at most

# Ids are UUIDv7 of accept times spread over six hours. Of ten jobs six are the first tenant's, in a tier that changes with every ten; the
# others' go round 49 tenants, each of whom has one tier. A job's tag is its place in its flow, in predicted device seconds.
LOAD = """
    INSERT INTO jobs (id, tenant_id, pool, tier, model, model_version, prompt, negative_prompt, width_px, height_px, num_steps, guidance,
                      sampler, seed, num_images, output_format, precision, determinism, release_tag, predicted_s, eta_raw_s, accepted_at,
                      start_by, run_within_s, currency)
    SELECT (lpad(to_hex((extract(epoch FROM at) * 1000)::bigint), 12, '0')
               || '7' || substr(noise, 1, 3) || '8' || substr(noise, 4, 15))::uuid,
           (CAST(:tenants AS uuid[]))[tenant + 1], :pool, (CAST(:tiers AS text[]))[tier + 1], 'pocket', '1',
           'a large red circle in the center on a blue background, number ' || i, '', 128, 128, 20, 1.5,
           'ddim', i, 1, 'png', 'fp32', 'best_effort', :now_s + place * 0.5, 0.5, 10, at, now() + interval '1 day', 600, 'USD'
    FROM (
        SELECT i, md5(i::text) AS noise, to_timestamp(:now_s - 21600 * (1 - i::float8 / (:over + :rows))) AS at,
               CASE WHEN is_bulk THEN 0 ELSE 1 + light % :light_tenants END AS tenant,
               CASE WHEN is_bulk THEN (i / 10) % 3 ELSE (1 + light % :light_tenants) % 3 END AS tier,
               CASE WHEN is_bulk THEN (i / 30) * 6 + i % 10 ELSE light / :light_tenants END AS place
        FROM (SELECT i, i % 10 < 6 AS is_bulk, (i / 10) * 4 + i % 10 - 6 AS light FROM generate_series(0, :over + :rows - 1) i) numbered
    ) placed ORDER BY i
"""
LEAVE = """
    UPDATE jobs SET state = 'succeeded', started_at = accepted_at, finished_at = now() - interval '2 hours' WHERE seed < :over
"""
IMAGES = "INSERT INTO images (job_id, index, seed) SELECT id, 0, seed FROM jobs"
RUN = """
    UPDATE jobs SET state = 'running', worker = :worker, attempt = 1, announced_at = now(), started_at = now(),
                    lease_expires_at = now() + interval '1 day', run_by = now() + interval '1 day'
    WHERE id IN (
        (SELECT id FROM jobs WHERE state = 'queued' AND tier = :tier AND tenant_id = :bulk ORDER BY release_tag LIMIT :running - 16)
        UNION ALL (SELECT id FROM jobs WHERE state = 'queued' AND tier = :tier AND tenant_id <> :bulk ORDER BY release_tag, id LIMIT 16))
"""
REJECT = """
    UPDATE jobs SET state = 'rejected', failure_code = 'unsupported', finished_at = now()
    WHERE id IN (SELECT id FROM jobs WHERE state = 'queued' AND tenant_id = :bulk AND tier = 'fast' ORDER BY seed LIMIT 5)
"""
COUNT_FLOWS = """
    INSERT INTO flows (pool, tier, tenant_id, finish_tag, queued_jobs, queued_images, queued_s)
    SELECT pool, tier, tenant_id, max(release_tag) + 0.5, count(*), sum(num_images), sum(predicted_s)
    FROM jobs WHERE state = 'queued' GROUP BY 1, 2, 3
"""
START_CLOCKS = """
    INSERT INTO fair_clocks (pool, tier, virtual_s) SELECT pool, tier, min(release_tag) FROM jobs WHERE state = 'queued' GROUP BY 1, 2
"""
BEAT = """
    INSERT INTO workers (name, pool, device, slots, seen_at, facts) VALUES (:worker, :pool, 'cpu', :slots, now() + interval '1 day', '{}')
"""
MISCOUNTED = """
    SELECT count(*) FROM flows FULL JOIN (
        SELECT pool, tier, tenant_id, count(*) AS jobs FROM jobs WHERE state = 'queued' GROUP BY 1, 2, 3
    ) counted USING (pool, tier, tenant_id) WHERE coalesce(queued_jobs, 0) <> coalesce(jobs, 0)
"""


@dataclass
class Queue:
    """One of the two databases, and the parts of the house that work on it."""

    rows: int
    app: Engine
    owner: Engine
    fleet: Fleet
    bulk: uuid.UUID
    wish: Resolved
    sweeper: Sweeper
    gauge: Gauge
    in_hand: int = 0  # images of TIER
    of_bulk: int = 0
    held: list[tuple[uuid.UUID, int]] = field(default_factory=list)
    waiting: list[uuid.UUID] = field(default_factory=list)  # the bulk tenant's in DRAWN_TIER
    deep: uuid.UUID | None = None  # half of the bulk tenant's jobs are newer

    def draw(self) -> uuid.UUID:
        """A job that waits; it is not drawn again."""
        place = random.randrange(len(self.waiting))
        self.waiting[place], self.waiting[-1] = self.waiting[-1], self.waiting[place]
        return self.waiting.pop()

    def accept(self, session: Session) -> Job:
        new_job = jobs.NewJob(
            params=self.wish,
            start_within_s=A_DAY_S,
            run_within_s=600.0,
            predicted_s=0.5,
            eta_raw_s=10.0,
        )
        own = {"tenant_id": self.bulk, "api_key_id": None, "currency": self.fleet.currency}
        return jobs.accept(session, new_job, **own, actor="benchmark")

    def refill(self) -> None:
        """One more job, for one that was taken out."""
        with transaction(self.app) as session:
            self.waiting.append(self.accept(session).id)


@dataclass(frozen=True)
class Act:
    """Something that is timed. group: the target that it counts for, if any."""

    name: str
    group: str
    do: Callable[[Queue, Session], Any]
    ends: str = "rollback"  # or commit; "read": the end of the transaction belongs to it; "own": it has transactions of its own
    after: Callable[[Queue, Any], None] = lambda queue, done: None  # not timed

    def run(self, queue: Queue) -> tuple[float, float]:
        """Seconds up to the end of the transaction, and with it."""
        if self.ends == "own":
            started_at = time.perf_counter()
            with Session(queue.app) as unused:
                done = self.do(queue, unused)
            before = after = time.perf_counter()
        else:
            started_at = time.perf_counter()
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


def _cancel(queue: Queue, session: Session) -> None:
    jobs.cancel(session, queue.draw(), tenant_id=queue.bulk, actor="benchmark")


def _pick(*, free: int, only_bulk: bool = False, bulk_at_cap: bool = False) -> Callable[[Queue, Session], int]:
    """What a release does in the database. free: images for which there is room."""

    def pick(queue: Queue, session: Session) -> int:
        workers.capacity(session, pool=POOL, silent_for_s=15)
        cap = queue.of_bulk if bulk_at_cap else None
        limits = ReleaseLimits(slots=SLOTS, limit_images=queue.in_hand + free, least_share=4, max_per_tenant=cap)
        picked = releasing.pick(session, pool=POOL, tier=TIER, limits=limits, tenant_id=queue.bulk if only_bulk else None)
        if len(picked) < free:
            raise SystemExit(f"{len(picked)} jobs were released where there was room for {free}")
        return len(picked)

    return pick


def _page(*, is_deep: bool = False, state: str | None = None, rows: int = PAGE) -> Callable[[Queue, Session], None]:
    def page(queue: Queue, session: Session) -> None:
        job_filter = JobFilter(before=queue.deep, state=state) if is_deep else JobFilter(state=state)
        found = listing.page(session, job_filter, tenant_id=queue.bulk, limit=PAGE).jobs
        if len(found) != rows:
            raise SystemExit(f"a page of {len(found)} jobs where {rows} were expected")

    return page


def _expect(queue: Queue, _: Session) -> None:
    """A forecaster that remembers nothing: it reads everything anew."""
    limits, refresher = queue.sweeper.release.limits, ThreadPoolExecutor(max_workers=1)  # that nobody asks for anything
    forecaster = QueueForecaster(queue.app, queue.fleet, queue.gauge, limits, refresher, worker_silence_s=15)
    forecaster.expect(queue.wish, queue.bulk)


def _sweep_part(name: str) -> Callable[[Queue, Session], None]:
    return lambda queue, _: getattr(queue.sweeper, name)()


SWEEP_PARTS = ("_leases", "_deadlines", "_stores", "_releases", "_lost_messages", "_gauges", "_etas", "_orphans")
SWEEP_PARTS += ("_audit_partitions", "_silent_workers", "_old_deliveries", "_old_idempotency_keys")
ACTS = (
    Act("claim", "claim", _claim, "commit", _end),
    Act("release at accept, room full", "release", _pick(free=0, only_bulk=True)),
    Act("release at accept, room for 8", "release", _pick(free=FREE, only_bulk=True)),
    Act("release, room for 8", "release", _pick(free=FREE)),
    Act("release, room for 8, bulk at its cap", "release", _pick(free=FREE, bulk_at_cap=True)),
    Act("release, room full", "release", _pick(free=0)),
    Act("accept", "", lambda queue, session: queue.accept(session).id, "commit", lambda queue, job_id: queue.waiting.append(job_id)),
    Act("cancel", "", _cancel, "commit", lambda queue, _: queue.refill()),
    *(Act(f"sweep: {name.strip('_').replace('_', ' ')}", "sweep", _sweep_part(name), "own") for name in SWEEP_PARTS),
    Act("sweep", "sweep", _sweep_part("sweep"), "own"),
    Act("list: first page", "list", _page(), "read"),
    Act("list: deep page", "list", _page(is_deep=True), "read"),
    Act("list: queued", "list", _page(state="queued"), "read"),
    Act("list: queued, deep page", "list", _page(is_deep=True, state="queued"), "read"),
    Act("list: succeeded, all of them older", "list", _page(state="succeeded"), "read"),
    Act("list: rejected, of which there are 5", "list", _page(state="rejected", rows=5), "read"),
    Act("queue_now", "", lambda queue, session: session.execute(text("SELECT * FROM queue_now")).all(), "read"),
    Act("forecaster", "", _expect, "own"),
    Act("renew 64 leases", "", lambda queue, session: leases.renew(session, queue.held, worker=WORKER, ttl_s=A_DAY_S), "commit"),
)


@contextmanager
def services() -> Iterator[dict[str, str]]:
    """Postgres, two Redis and the object store of a stack without a house: its environment."""
    with tempfile.TemporaryDirectory(prefix="darkroom-bench-") as folder:
        stack = Stack(Path(folder) / "data")
        try:
            with stack._lock():
                stack._migrate(stack._up_services(time.monotonic() + 60))  # for the roles and their passwords
            yield stack.env
        finally:
            stack.down()


def fill(env: dict[str, str], rows: int, number: int, *, make_tables: Callable[[str], None] | None = None) -> Queue:
    """A database with so many waiting jobs. number: of its own queues in the broker.

    make_tables: is handed the owner's URL and makes other tables than those of the migrations, at their revision.
    """
    name = f"backlog_{number}"
    server = create_engine(env["MIGRATION_DATABASE_URL"], isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    server.dispose()

    def url(variable: str) -> str:
        return make_url(env[variable]).set(database=name).render_as_string(hide_password=False)

    if make_tables is not None:
        make_tables(url("MIGRATION_DATABASE_URL"))
    migrations.upgrade(url("MIGRATION_DATABASE_URL"))
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    broker_url = make_url(env["BROKER_URL"]).set(database=str(number)).render_as_string(hide_password=False)
    changed = {"database_url": url("DATABASE_URL"), "broker_url": broker_url}
    settings = Settings(**{key.lower(): value for key, value in env.items() if key.lower() in Settings.model_fields} | changed)
    sweeper = build(settings, fleet)
    app = sweeper.database
    owner = create_engine(url("MIGRATION_DATABASE_URL"))
    with transaction(app) as session:
        ids = [tenants.create(session, name=f"tenant-{place}").id for place in range(TENANTS)]
    _load(owner, rows, ids, list(fleet.tiers))
    wish = resolve(fleet, Wish(prompt="a large red circle in the center on a blue background", tier=DRAWN_TIER), default_seed=7, draw=0.0)
    gauge = Gauge(settings.handoff_url)
    return Queue(rows, app, owner, fleet, ids[0], wish, sweeper, gauge)


def _load(owner: Engine, rows: int, ids: Sequence[uuid.UUID], tiers: Sequence[str]) -> None:
    facts = {
        "rows": rows,
        "over": rows // 10,
        "tenants": [str(tenant) for tenant in ids],
        "tiers": list(tiers),
        "light_tenants": TENANTS - 1,
        "now_s": time.time(),
    }
    facts |= {"pool": POOL, "tier": TIER, "bulk": ids[0], "running": RUNNING, "worker": WORKER, "slots": SLOTS}
    with owner.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))  # no triggers: flows are counted once, below
        for statement in (LOAD, IMAGES):
            connection.execute(text(statement), facts)
    with owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM"))
    with owner.begin() as connection:
        connection.execute(text("SET LOCAL session_replication_role = replica"))
        for statement in (LEAVE, RUN, REJECT, COUNT_FLOWS, START_CLOCKS, BEAT, "ANALYZE"):
            connection.execute(text(statement), facts)


def settle(queues: Sequence[Queue]) -> None:
    """Let the sweepers release and announce until they find nothing more to do, and see what is in hand then."""
    for _ in range(6):
        for queue in queues:
            queue.sweeper.sweep()
        time.sleep(1)
    for queue in queues:
        with transaction(queue.app) as session:
            outstanding = releasing.outstanding_in(session, pool=POOL, tier=TIER)
            queue.in_hand, queue.of_bulk = outstanding.total_images, outstanding.images[queue.bulk]
            queue.held = [(job_id, attempt) for job_id, attempt in session.execute(select(Job.id, Job.attempt).where(Job.worker == WORKER))]
            own = select(Job.id).where(Job.tenant_id == queue.bulk)
            drawable = own.where(Job.tier == DRAWN_TIER, Job.state == JobState.QUEUED, Job.announced_at.is_(None))
            queue.waiting = list(session.scalars(drawable))
            queue.deep = session.scalar(own.order_by(Job.id.desc()).offset(int(queue.rows * 0.3)).limit(1))
        with queue.owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("CHECKPOINT"))  # what the load wrote is not written while we measure


Times = dict[tuple[str, int], list[tuple[float, float]]]  # by act and place of its database, one pair a round


def measure(queues: Sequence[Queue], rounds: int) -> Times:
    """Every act once a round in every database; the order of the databases turns from round to round."""
    times: Times = defaultdict(list)
    gc.collect()
    gc.freeze()
    gc.disable()
    for turn in range(-3, rounds):  # the first three warm connections and caches
        for act in ACTS:
            for place in (0, 1) if turn % 2 else (1, 0):
                took = act.run(queues[place])
                if turn >= 0:
                    times[act.name, place].append(took)
        gc.collect()
    gc.enable()
    return times


def check(queue: Queue) -> None:
    """The queue kept its length, and the flows count what is there."""
    with queue.owner.connect() as connection:
        queued = connection.scalar(text("SELECT count(*) FROM jobs WHERE state = 'queued'"))
        miscounted = connection.scalar(text(MISCOUNTED))
    print(f"{queue.rows:,} rows: {queued:,} jobs wait in the end, {miscounted} flows miscount", file=sys.stderr)
    if miscounted or abs(queued - queue.rows) > queue.rows * 0.5:
        raise SystemExit("the queue is not what it should be")


def ratio_of(small: Sequence[float], large: Sequence[float]) -> tuple[float, float, float]:
    """Large / small, of the medians: over all rounds, and the least and the greatest of the run's stretches."""
    size = max(1, len(small) // STRETCHES)
    parts = [
        statistics.median(large[start : start + size]) / statistics.median(small[start : start + size])
        for start in range(0, size * STRETCHES, size)
    ]
    return statistics.median(large) / statistics.median(small), min(parts), max(parts)


def report(times: Times, labels: Sequence[str], rounds: int, *, benchmark: str, most: Mapping[str, float], facts: Mapping[str, Any]) -> int:
    """Print every act's figures and say whether the worst ratio of each group keeps to `most`: 0 if all do, else 1."""
    table = Table(title=f"milliseconds, {rounds} times each")
    table.add_column("act")
    for column in (f"{labels[0]}: p50", "p95", f"{labels[1]}: p50", "p95", "ratio", "of stretches"):
        table.add_column(column, justify="right")
    figures: dict[str, Any] = {}
    worst: dict[str, float] = defaultdict(float)
    for act in ACTS:
        lines = {"read": ((act.name, 1),), "own": ((act.name, 1),), "rollback": ((act.name, 0),)}
        for name, end in lines.get(act.ends, ((act.name, 0), (f"{act.name}, with its commit", 1))):
            series = [[took[end] for took in times[act.name, place]] for place in (0, 1)]
            ratio, least, greatest = ratio_of(*series)
            cells = [(statistics.median(each) * 1000, percentile(each, 0.95) * 1000) for each in series]
            table.add_row(name, *(f"{value:.2f}" for pair in cells for value in pair), f"{ratio:.2f}", f"{least:.2f} to {greatest:.2f}")
            figures[name] = {"ms": [round(value, 3) for pair in cells for value in pair], "ratio": round(ratio, 3)}
            worst[act.group] = max(worst[act.group], ratio)
    Console(width=140).print(table)
    figures |= {f"{group}_ratio": round(worst[group], 3) for group in most}
    met = {f"{group}_ratio": worst[group] <= limit for group, limit in most.items()}
    targets = {f"{group}_ratio": f"<= {limit}" for group, limit in most.items()}
    print(
        json.dumps(
            {"benchmark": benchmark, "figures": figures, "targets": targets, "met": met, "rounds": rounds, "tenants": TENANTS, **facts}
        )
    )
    return 0 if all(met.values()) else 1


def explain(queue: Queue) -> None:
    """The plan of every statement of every act, as executed. A statement of several acts is shown once, but for lists."""
    shown: set[tuple[str, str]] = set()
    for act in ACTS:
        statements: list[tuple[str, Any]] = []

        def note(connection: Any, cursor: Any, statement: str, parameters: Any, context: Any, many: bool, to: Any = statements) -> None:
            to.append((statement, parameters))

        event.listen(queue.app, "before_cursor_execute", note)
        act_alone = Act(act.name, act.group, act.do, "own" if act.ends == "own" else "rollback")
        act_alone.run(queue)
        event.remove(queue.app, "before_cursor_execute", note)
        with queue.app.connect() as connection:  # what the act wrote was rolled back: here it happens again
            for statement, parameters in statements:
                lines = connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS) {statement}", parameters).scalars().all()
                key = (statement, act.name if act.group == "list" else "")  # another state may get another plan
                if key not in shown:
                    shown.add(key)
                    print(f"\n-- {act.name}\n-- {' '.join(statement.split())[:300]}\n" + "\n".join(lines))
            connection.rollback()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100,000 rows and fewer rounds; ends within a minute")
    parser.add_argument("--explain", action="store_true", help="print the plans of the statements, in the large database")
    options = parser.parse_args()
    telemetry.configure_logs("ERROR")
    random.seed(7)
    sizes, rounds = (SMALL, 100_000 if options.quick else 1_000_000), 40 if options.quick else 300
    with services() as env:
        queues = [fill(env, rows, number) for number, rows in enumerate(sizes, start=1)]
        settle(queues)
        times = measure(queues, rounds)
        for queue in queues:
            check(queue)
        if options.explain:
            explain(queues[-1])
        for queue in queues:
            queue.app.dispose()
            queue.owner.dispose()
    labels = [f"{rows:,} rows" for rows in sizes]
    return report(times, labels, rounds, benchmark="backlog", most=TARGETS, facts={"rows": list(sizes)})


if __name__ == "__main__":
    sys.exit(main())
