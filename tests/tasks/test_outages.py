"""The sweeper while its surroundings answer with errors.

What it does not hold against jobs, and what it does not multiply.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import urlsplit

import pytest
import redis
from sqlalchemy import Row, create_engine, text
from sqlalchemy.exc import OperationalError

import models.sweeping
import tasks.keeper
import tasks.sweep
from benchmarks.lib.refusals import REPLIES, RefusingProxy
from edges.broker import job_of_message
from edges.handoff import Handoff
from edges.progress import ENDINGS, Listener
from models import leases
from models.database import transaction
from models.tables import Job
from policy import queues
from settings import Settings
from tasks.keeper import LeaseKeeper, WorkerIdentity
from tasks.roles.maintenance import build
from tasks.sweep import Sweeper, SweepLoop
from tests.builders import (
    a_closed_port,
    a_fleet,
    a_job,
    a_lease,
    hand_off,
    settings_for,
    some_pixels,
    until,
)
from tests.clocks import KeptClock
from tests.models.conftest import Database, a_database
from tests.tasks.conftest import metric

TEST_REDIS_DB = 7  # of Redis's sixteen numbered databases: nobody else looks there


@dataclass
class Sweeping:
    """A sweeper that sweeps when it is told to, and the ways to its broker and hand-off."""

    sweeper: Sweeper
    database: Database
    ways: dict[str, RefusingProxy]
    broker: redis.Redis
    handoff: Handoff

    def accept(self, **params) -> Job:
        with transaction(self.database.app) as session:
            return a_job(session, **params)

    def row(self, job: Job) -> Job:
        with transaction(self.database.app) as session:
            found = session.get(Job, job.id)
            session.expunge(found)
            return found

    def left_s(self, job: Job) -> float:
        """Seconds until the job's start deadline, also in an outage."""
        with transaction(self.database.owner) as session:
            query = text(
                "SELECT extract(epoch FROM start_by - clock_timestamp()) FROM jobs WHERE id = :id"
            )
            return float(session.scalar(query, {"id": job.id}))

    def can_start(self, job: Job) -> bool:
        with transaction(self.database.app) as session:
            return (
                leases.take(session, job.id, worker="gpu0@here", device="cpu", ttl_s=15) is not None
            )

    def miss_start(self, job: Job) -> None:
        """Wait until the job's start deadline has passed."""
        until(lambda: self.left_s(job) < 0, within_s=60, what="its deadline")


@pytest.fixture(scope="module")
def own_database(stack) -> Iterator[Database]:
    with a_database(stack.env) as database:
        yield database


@pytest.fixture
def sweeping(stack, own_database) -> Iterator[Sweeping]:
    urls, ways, clients = {}, {}, {}
    for name in ("broker", "handoff"):
        parts, port = (
            urlsplit(stack.env[f"{name.upper()}_URL"])._replace(path=f"/{TEST_REDIS_DB}"),
            a_closed_port(),
        )
        ways[name] = RefusingProxy(port, parts.port)
        urls[f"{name}_url"] = parts._replace(
            netloc=parts.netloc.replace(f":{parts.port}", f":{port}")
        ).geturl()
        clients[name] = redis.Redis.from_url(parts.geturl())
        clients[name].flushdb()
    urls["database_url"] = own_database.app.url.render_as_string(hide_password=False)
    settings = settings_for(Settings, stack.env, lease_renew_s=1.0, **urls)
    sweeper = build(settings, a_fleet())
    handoff = Handoff(settings.handoff_url, ttl_s=60)
    yield Sweeping(sweeper, own_database, ways, clients["broker"], handoff)
    for way in ways.values():
        way.close()
    for client in clients.values():
        client.flushdb()


@contextmanager
def refusing(sweeping: Sweeping, part: str) -> Iterator[None]:
    if part != "postgres":
        with sweeping.ways[part].refusing(REPLIES["READONLY"]):
            yield
        return
    url, name = sweeping.database.owner_url, sweeping.database.app.url.database
    server = create_engine(
        url,
        isolation_level="AUTOCOMMIT",
        connect_args={"options": "-c default_transaction_read_only=off"},
    )

    def say(statement: str) -> Sequence[Row]:
        with server.connect() as connection:
            answer = connection.execute(text(statement))
            return answer.all() if answer.returns_rows else []

    connected = (
        " FROM pg_stat_activity WHERE datname = current_database() AND usename = 'darkroom_app'"
    )
    say(f"ALTER DATABASE {name} SET default_transaction_read_only = on")
    before = [str(row.pid) for row in say(f"SELECT pid, pg_terminate_backend(pid){connected}")]
    still = f"SELECT pid{connected} AND pid IN ({', '.join(before)})"
    until(lambda: not before or not say(still), what="the end of all connections from before")
    sweeping.database.app.dispose()  # it checks no connection that was in use a moment ago
    try:
        yield
    finally:
        say(f"ALTER DATABASE {name} RESET default_transaction_read_only")
        server.dispose()


@pytest.fixture
def clock(monkeypatch) -> KeptClock:
    """The clock by which sweepers tell how long something lasted."""
    clock = KeptClock()
    monkeypatch.setattr(tasks.sweep, "time", clock)
    return clock


@pytest.mark.parametrize("part", ["broker", "handoff", "postgres"])
def test_a_start_deadline_that_falls_into_an_outage_is_moved_by_what_that_lasted(
    sweeping, clock, part
):
    sweeping.sweeper.sweep()
    job = sweeping.accept(start_within_s=0.3)

    with refusing(sweeping, part):
        sweeping.miss_start(job)
        for _ in range(3):
            clock.go_on(100)
            sweeping.sweeper.sweep()
    sweeping.sweeper.sweep()

    assert sweeping.row(job).state == "queued"
    assert 200 < sweeping.left_s(job) <= 300
    assert sweeping.can_start(job)


def test_a_job_that_was_overdue_before_the_outage_expires(sweeping):
    sweeping.sweeper.sweep()
    job = sweeping.accept(start_within_s=-60)

    with refusing(sweeping, "broker"):
        sweeping.sweeper.sweep()

    assert sweeping.row(job).state == "expired"


def test_a_deadline_that_leaves_time_enough_stays_where_it_is(sweeping, clock):
    sweeping.sweeper.sweep()
    job = sweeping.accept(start_within_s=600)
    before = sweeping.row(job).start_by

    with refusing(sweeping, "broker"):
        for _ in range(3):
            clock.go_on(60)
            sweeping.sweeper.sweep()
    sweeping.sweeper.sweep()

    assert sweeping.row(job).start_by == before


def test_a_database_that_comes_back_in_the_midst_of_a_sweep_does_not_make_it_hasty(
    sweeping, monkeypatch
):
    sweeping.sweeper.sweep()
    job = sweeping.accept(start_within_s=0.3)
    sweeping.miss_start(job)

    with monkeypatch.context() as patched:
        patched.setattr(models.sweeping, "prolong_deadlines", fails)
        with refusing(sweeping, "broker"):
            sweeping.sweeper.sweep()
    assert sweeping.row(job).state == "queued"

    sweeping.sweeper.sweep()
    assert sweeping.can_start(job)


def fails(*arguments, **keywords):
    raise OperationalError("UPDATE jobs", {}, Exception("the server closed the connection"))


def test_without_an_outage_a_deadline_is_a_deadline(sweeping):
    job = sweeping.accept(start_within_s=0.3)

    until(lambda: sweeping.sweeper.sweep() or sweeping.row(job).state != "queued")

    assert sweeping.row(job).state == "expired"


def test_jobs_that_wait_in_a_broker_outage_are_announced_by_the_first_sweep_after_it(sweeping):
    with refusing(sweeping, "broker"):
        job = sweeping.accept()
        sweeping.sweeper.sweep()
        assert sweeping.row(job).announced_at is None

    sweeping.sweeper.sweep()

    assert sweeping.row(job).announced_at is not None
    assert messages_of(sweeping, job) == 1


def test_lease_that_ran_out_in_an_outage_of_postgres_may_be_renewed_before_it_is_ended(
    sweeping, clock
):
    with transaction(sweeping.database.app) as session:
        job = a_lease(session, ttl_s=-1).job
    with refusing(sweeping, "postgres"):
        sweeping.sweeper.sweep()
        clock.go_on(10)
        sweeping.sweeper.sweep()

    for _ in range(2):
        sweeping.sweeper.sweep()
        assert sweeping.row(job).state == "running", "for lease_renew_s from then on"
        clock.go_on(0.45 * sweeping.sweeper.settings.lease_renew_s)

    clock.go_on(0.2 * sweeping.sweeper.settings.lease_renew_s)
    sweeping.sweeper.sweep()
    assert sweeping.row(job).state == "queued"


def test_lease_that_ran_out_without_an_outage_is_ended_at_once(sweeping):
    with transaction(sweeping.database.app) as session:
        job = a_lease(session, ttl_s=-1).job

    sweeping.sweeper.sweep()

    assert sweeping.row(job).state == "queued"


def announced_long_ago(sweeping: Sweeping, **ages_s: float) -> dict[str, Job]:
    """Jobs that were announced so many seconds ago; no message of theirs is anywhere."""
    made = {name: sweeping.accept() for name in ages_s}
    with transaction(sweeping.database.app) as session:
        for name, age_s in ages_s.items():
            at = "clock_timestamp() - make_interval(secs => :s)"
            query = text(f"UPDATE jobs SET announced_at = {at} WHERE id = :id")
            session.execute(query, {"s": age_s, "id": made[name].id})
    return made


def messages_of(sweeping: Sweeping, job: Job) -> int:
    found = [job_of_message(raw) for raw in sweeping.broker.lrange("local.fast", 0, -1)]
    return found.count(job.id)


def test_job_whose_message_was_overtaken_is_announced_again_and_no_other(sweeping):
    made = announced_long_ago(sweeping, old=10, same_age=5.5, young=4)
    announce = sweeping.sweeper.broker.announce
    announce(queues.RENDER_JOB, "local.fast", made["young"].id, num_images=1)

    sweeping.sweeper.sweep()

    messages = {name: messages_of(sweeping, job) for name, job in made.items()}
    assert messages == {"old": 1, "same_age": 0, "young": 1}


def test_jobs_announced_a_while_ago_are_announced_again_when_no_message_is_left(sweeping):
    made = announced_long_ago(sweeping, old=4, fresh=1)

    sweeping.sweeper.sweep()

    messages = {name: messages_of(sweeping, job) for name, job in made.items()}
    assert messages == {"old": 1, "fresh": 0}


def a_storing_job(sweeping: Sweeping) -> Job:
    with transaction(sweeping.database.app) as session:
        lease = a_lease(session)
        sweeping.handoff.put(lease.job_id, 0, lease.attempt, some_pixels())
        return hand_off(session, lease)


def make_overdue(sweeping: Sweeping) -> None:
    with transaction(sweeping.database.app) as session:
        session.execute(
            text(
                "UPDATE jobs SET store_by = clock_timestamp() - interval '1 second' "
                "WHERE state = 'storing'"
            )
        )


def test_while_nobody_stores_a_queue_gets_no_more_messages_than_there_are_jobs_to_store(sweeping):
    queue = queues.results_queue(sweeping.sweeper.fleet, "fast")
    stored = [a_storing_job(sweeping) for _ in range(3)]

    for _ in range(4):
        make_overdue(sweeping)
        sweeping.sweeper.sweep()
        assert sweeping.broker.llen(queue) == len(stored)

    sweeping.broker.rpop(queue)  # a results worker took one, and was killed
    make_overdue(sweeping)
    sweeping.sweeper.sweep()
    assert sweeping.broker.llen(queue) == len(stored)


def test_sweep_ends_a_storing_job_whose_pixels_were_lost_once_too_often(sweeping):
    job = a_storing_job(sweeping)
    ended = []
    listener = Listener(sweeping.sweeper.settings.handoff_url, ENDINGS, ended.append)
    with transaction(sweeping.database.app) as session:
        query = text("UPDATE images SET hand_offs_lost = 4 WHERE job_id = :id")
        session.execute(query, {"id": job.id})
    sweeping.handoff.drop(job.id, 0, 1)
    before = metric("darkroom_swept_total", why="hand_off_lost")

    make_overdue(sweeping)
    sweeping.sweeper.sweep()

    assert (sweeping.row(job).state, sweeping.row(job).failure_code) == ("failed", "not_stored")
    assert metric("darkroom_swept_total", why="hand_off_lost") > before
    until(lambda: job.id in ended, within_s=60, what="the word of its end")
    listener.close()


def test_a_sweep_that_fails_is_followed_by_the_next_and_the_loop_tells_that_it_moves():
    turns, swept, enough = [], [], threading.Event()

    def sweep() -> None:
        swept.append(time.monotonic())
        if len(swept) >= 3:
            enough.set()
        raise RuntimeError("nobody foresaw this")

    loop = SweepLoop(sweep, every_s=0.01, on_turn=lambda: turns.append(1))
    loop.start()

    assert enough.wait(60)
    loop.stop()
    assert len(turns) >= 3


def test_a_worker_waits_for_a_database_that_is_away_when_it_starts(sweeping, monkeypatch):
    tries, begins = [], LeaseKeeper._begins
    monkeypatch.setattr(tasks.keeper, "RETRY_S", 0.05)
    monkeypatch.setattr(
        LeaseKeeper, "_begins", lambda *arguments: tries.append(1) or begins(*arguments)
    )
    identity = WorkerIdentity(name="cpu0@early", pool="local", device="cpu", slots=4, facts={})
    keeper = LeaseKeeper(
        sweeping.database.app, identity, ended=sweeping.sweeper.ended, ttl_s=6, renew_s=1, stop_s=5
    )
    starting = threading.Thread(target=lambda: keeper.start(max_attempts=5))

    with refusing(sweeping, "postgres"):
        starting.start()
        until(lambda: len(tries) >= 3, within_s=60, what="a few tries")
        assert starting.is_alive()

    starting.join(timeout=60)
    assert not starting.is_alive()
    keeper.close()


def test_sweeper_that_stood_by_while_another_swept_takes_that_time_for_no_outage(
    sweeping,
    monkeypatch,
):
    another = build(sweeping.sweeper.settings, sweeping.sweeper.fleet)
    now = time.monotonic
    monkeypatch.setattr(tasks.sweep.time, "monotonic", lambda: now() + 60)
    sweeping.sweeper.on_turn = another.sweep  # in the midst of our passes
    sweeping.sweeper.sweep()
    sweeping.sweeper.on_turn = lambda: None
    job = sweeping.accept(start_within_s=30)
    before = sweeping.row(job).start_by

    with refusing(sweeping, "broker"):
        another.sweep()

    assert sweeping.row(job).start_by == before, "the outage lasted no minute"


def test_lost_message_of_the_front_queue_is_missed_though_the_tier_s_own_queue_has_some(sweeping):
    made = announced_long_ago(sweeping, plain=10, front=5)
    with transaction(sweeping.database.app) as session:
        query = text("UPDATE jobs SET is_front = true WHERE id = :id")
        session.execute(query, {"id": made["front"].id})
    announce = sweeping.sweeper.broker.announce
    announce(queues.RENDER_JOB, "local.fast", made["plain"].id, num_images=1)

    sweeping.sweeper.sweep()

    front = [job_of_message(raw) for raw in sweeping.broker.lrange("local.fast.front", 0, -1)]
    assert made["front"].id in front
    assert made["plain"].id not in front
    assert messages_of(sweeping, made["plain"]) == 1
