"""A database with a queue of any length, and the parts of Darkroom that work on it."""

import random
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Engine, create_engine, make_url, select, text
from sqlalchemy.orm import Session

import migrations
from benchmarks.lib.queue import statements
from edges.handoff import Gauge
from models import jobs, releasing, tenants
from models.accepting import NewJob
from models.database import transaction
from models.tables import Job
from policy.catalog import resolve
from policy.fleet import Fleet, parse_fleet
from policy.params import RequestedParams, Resolved
from policy.states import JobState
from settings import REPO, Settings
from tasks.roles.maintenance import build
from tasks.sweep import Sweeper

# Of the fleet.toml of the repository; claims are drawn from a tier of their own.
POOL = "local"
TIER = "quality"
DRAWN_TIER = "batch"
TENANTS = 50
RUNNING = 64
SLOTS = 64
WORKER = "gpu0@benchmark"
A_DAY_S = 86_400.0


@dataclass
class Queue:
    """One of the two databases."""

    rows: int
    app: Engine
    owner: Engine
    fleet: Fleet
    bulk: uuid.UUID
    params: Resolved
    sweeper: Sweeper
    gauge: Gauge
    in_hand: int = 0  # images of TIER
    of_bulk: int = 0
    held: list[tuple[uuid.UUID, int]] = field(default_factory=list)
    waiting: list[uuid.UUID] = field(default_factory=list)  # the bulk tenant's in DRAWN_TIER
    deep: uuid.UUID | None = None  # half of the bulk tenant's jobs are newer

    def draw(self) -> uuid.UUID:
        """Draw a job that waits; it is not drawn again."""
        place = random.randrange(len(self.waiting))
        self.waiting[place], self.waiting[-1] = self.waiting[-1], self.waiting[place]
        return self.waiting.pop()

    def accept(self, session: Session) -> Job:
        """Accept another job of the bulk tenant."""
        new_job = NewJob(
            params=self.params,
            start_within_s=A_DAY_S,
            run_within_s=600.0,
            predicted_s=0.5,
            eta_raw_s=10.0,
        )
        return jobs.accept(
            session,
            new_job,
            tenant_id=self.bulk,
            api_key_id=None,
            currency=self.fleet.currency,
            actor="benchmark",
        )

    def refill(self) -> None:
        """Accept one more job, for one that was taken out."""
        with transaction(self.app) as session:
            self.waiting.append(self.accept(session).id)

    def close(self) -> None:
        """Give the connections back."""
        self.app.dispose()
        self.owner.dispose()


def fill(
    env: Mapping[str, str],
    rows: int,
    number: int,
    *,
    make_tables: Callable[[str], None] | None = None,
) -> Queue:
    """Make a database with so many waiting jobs. number: of its own queues in the broker.

    make_tables: is handed the owner's URL and makes other tables than those of the migrations, at
    their revision.
    """
    name = f"backlog_{number}"
    server = create_engine(env["MIGRATION_DATABASE_URL"], isolation_level="AUTOCOMMIT")
    with server.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {name}"))
    server.dispose()
    owner_url = _with_database(env["MIGRATION_DATABASE_URL"], name)
    if make_tables is not None:
        make_tables(owner_url)
    migrations.upgrade(owner_url)
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    settings = _settings(env, name, number)
    sweeper = build(settings, fleet)
    owner = create_engine(owner_url)
    with transaction(sweeper.database) as session:
        ids = [tenants.create(session, name=f"tenant-{place}").id for place in range(TENANTS)]
    _load(owner, rows, ids, list(fleet.tiers))
    requested = RequestedParams(
        prompt="a large red circle in the center on a blue background", tier=DRAWN_TIER
    )
    return Queue(
        rows=rows,
        app=sweeper.database,
        owner=owner,
        fleet=fleet,
        bulk=ids[0],
        params=resolve(fleet, requested, default_seed=7),
        sweeper=sweeper,
        gauge=Gauge(settings.handoff_url),
    )


def settle(queues: Sequence[Queue]) -> None:
    """Let the sweepers release and announce until they find nothing more to do.

    Then see what is in hand.
    """
    for _ in range(6):
        for queue in queues:
            queue.sweeper.sweep()
        time.sleep(1)
    for queue in queues:
        with transaction(queue.app) as session:
            outstanding = releasing.outstanding_in(session, pool=POOL, tier=TIER)
            queue.in_hand = outstanding.total_images
            queue.of_bulk = outstanding.images[queue.bulk]
            held = session.execute(select(Job.id, Job.attempt).where(Job.worker == WORKER))
            queue.held = [(job_id, attempt) for job_id, attempt in held]
            own = select(Job.id).where(Job.tenant_id == queue.bulk)
            drawable = own.where(
                Job.tier == DRAWN_TIER, Job.state == JobState.QUEUED, Job.announced_at.is_(None)
            )
            queue.waiting = list(session.scalars(drawable))
            by_age = own.order_by(Job.id.desc())
            queue.deep = session.scalar(by_age.offset(int(queue.rows * 0.3)).limit(1))
        with queue.owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            # What the load wrote is not written while we measure.
            connection.execute(text("CHECKPOINT"))


def check(queue: Queue) -> None:
    """See that the queue kept its length, and that the flows count what is there."""
    with queue.owner.connect() as connection:
        queued = connection.scalar(text("SELECT count(*) FROM jobs WHERE state = 'queued'"))
        miscounted = connection.scalar(text(statements.MISCOUNTED))
    print(
        f"{queue.rows:,} rows: {queued:,} jobs wait in the end, {miscounted} flows miscount",
        file=sys.stderr,
    )
    if miscounted or abs(queued - queue.rows) > queue.rows * 0.5:
        raise SystemExit("the queue is not what it should be")


def _with_database(url: str, name: str) -> str:
    return make_url(url).set(database=name).render_as_string(hide_password=False)


def _settings(env: Mapping[str, str], name: str, number: int) -> Settings:
    """Return the settings of a stack whose database and broker database are these."""
    shared = {
        key.lower(): value for key, value in env.items() if key.lower() in Settings.model_fields
    }
    own = {
        "database_url": _with_database(env["DATABASE_URL"], name),
        "broker_url": _with_database(env["BROKER_URL"], str(number)),
    }
    values: dict[str, Any] = shared | own
    return Settings(**values)


def _load(owner: Engine, rows: int, ids: Sequence[uuid.UUID], tiers: Sequence[str]) -> None:
    facts = {
        "rows": rows,
        "over": rows // 10,
        "tenants": [str(tenant) for tenant in ids],
        "tiers": list(tiers),
        "light_tenants": TENANTS - 1,
        "now_s": time.time(),
        "pool": POOL,
        "tier": TIER,
        "bulk": ids[0],
        "running": RUNNING,
        "worker": WORKER,
        "slots": SLOTS,
    }
    without_triggers = text("SET LOCAL session_replication_role = replica")  # flows: counted below
    with owner.begin() as connection:
        connection.execute(without_triggers)
        for statement in (statements.LOAD, statements.IMAGES):
            connection.execute(text(statement), facts)
    with owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM"))
    with owner.begin() as connection:
        connection.execute(without_triggers)
        for statement in (
            statements.LEAVE,
            statements.RUN,
            statements.REJECT,
            statements.COUNT_FLOWS,
            statements.START_CLOCKS,
            statements.BEAT,
            "ANALYZE",
        ):
            connection.execute(text(statement), facts)
