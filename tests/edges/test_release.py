"""From waiting rows to messages: stamped, committed, published; nothing is lost when the broker is."""

import uuid

import pytest
from sqlalchemy import text

from edges.broker import Broker, job_of_message
from edges.release import Release
from models import workers
from models.database import transaction
from models.tables import Job
from settings import StoreSettings
from tests.builders import GONE, a_closed_port, a_fleet, a_job, a_lease


@pytest.fixture
def pool() -> str:
    return f"pool-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def fleet(pool):
    """A pool of 8 slots and batches of 4."""
    shape = {"models": ["pocket"], "slots": 8, "max_batch_rows": 4}
    rows = {"128x128": 4, "128x192": 4}
    return a_fleet({f"pools.{pool}": shape, "pools.local": GONE, "models.pocket.tiers.quality.bucket_rows": rows})


@pytest.fixture
def release(database, settings, broker_redis, fleet) -> Release:
    return Release(database.app, Broker(settings, fleet), fleet, worker_silence_s=15)


@pytest.fixture
def release_without_broker(database, settings, fleet) -> Release:
    away = StoreSettings(**{**settings.model_dump(), "broker_url": f"redis://127.0.0.1:{a_closed_port()}/0"})
    return Release(database.app, Broker(away, fleet), fleet, worker_silence_s=15)


@pytest.fixture
def accept(database, pool):
    """Accept that many jobs; their ids in fair order."""

    def accept(count):
        with transaction(database.app) as session:
            return [a_job(session, pool=pool, release_tag=float(number)).id for number in range(count)]

    return accept


def messages(broker_redis, pool) -> list[uuid.UUID]:
    """The jobs of the messages in the queue, the one that is taken first in front."""
    return [job_of_message(raw) for raw in reversed(broker_redis.lrange(f"{pool}.fast", 0, -1))]


def stamped(database, pool) -> int:
    with transaction(database.app) as session:
        return session.scalar(text("SELECT count(announced_at) FROM jobs WHERE pool = :pool"), {"pool": pool})


def test_waiting_jobs_become_messages_in_fair_order_up_to_slots_and_one_batch(release, accept, pool, broker_redis, database):
    waiting = accept(15)

    assert release.release(pool, "fast") == 12

    assert messages(broker_redis, pool) == waiting[:12]
    assert stamped(database, pool) == 12
    assert release.release(pool, "fast") == 0


def test_more_live_workers_make_more_room(release, accept, pool, database):
    accept(25)
    with transaction(database.app) as session:
        for number in range(2):
            workers.heartbeat(session, name=f"gpu{number}@{pool}", pool=pool, device="cpu", slots=8, facts={})

    assert release.release(pool, "fast") == 20


def test_while_the_broker_is_away_jobs_wait_on_in_postgres(release_without_broker, release, accept, pool, broker_redis, database):
    waiting = accept(3)

    assert release_without_broker.release(pool, "fast") == 0
    assert stamped(database, pool) == 0

    assert release.release(pool, "fast") == 3
    assert messages(broker_redis, pool) == waiting


def test_a_lost_message_is_sent_again_unless_a_worker_has_the_job(release, accept, pool, broker_redis, database):
    lost, taken = accept(2)
    release.release(pool, "fast")
    broker_redis.flushdb()
    with transaction(database.app) as session:
        a_lease(session, session.get(Job, taken))

    assert release.again(pool, "fast", [lost, taken]) == 1

    assert messages(broker_redis, pool) == [lost]
