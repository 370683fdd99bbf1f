"""From waiting rows to messages: stamped, committed, published.

Nothing is lost when the broker is.
"""

import json
import uuid

import pytest
from sqlalchemy import text

from dispatch.release import Release
from edges.broker import Broker, job_of_message
from models import files, jobs, workers
from models.database import transaction
from models.tables import Job
from policy import queues
from settings import StoreSettings
from tests.builders import GONE, a_closed_port, a_fleet, a_job, a_lease, a_tenant


@pytest.fixture
def pool() -> str:
    return f"pool-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def fleet(pool):
    """A pool of 8 slots and batches of 4."""
    shape = {"models": ["pocket"], "slots": 8, "max_batch_rows": 4}
    rows = {"128x128": 4, "128x192": 4}
    return a_fleet(
        {
            f"pools.{pool}": shape,
            "pools.local": GONE,
            "models.pocket.tiers.quality.bucket_rows": rows,
        }
    )


@pytest.fixture
def release(database, settings, broker_redis, fleet) -> Release:
    return Release(database.app, Broker(settings, fleet), fleet, worker_silence_s=15)


@pytest.fixture
def release_without_broker(database, settings, fleet) -> Release:
    away = StoreSettings(
        **{**settings.model_dump(), "broker_url": f"redis://127.0.0.1:{a_closed_port()}/0"}
    )
    return Release(database.app, Broker(away, fleet), fleet, worker_silence_s=15)


@pytest.fixture
def accept(database, pool):
    """Accept that many jobs; their ids in fair order."""

    def accept(count):
        with transaction(database.app) as session:
            return [
                a_job(session, pool=pool, release_tag=float(number)).id for number in range(count)
            ]

    return accept


def messages(broker_redis, pool, tier="fast", *, is_front=False) -> list[uuid.UUID]:
    """The jobs of the messages in the queue, the one that is taken first in front."""
    queue = f"{pool}.{tier}.front" if is_front else f"{pool}.{tier}"
    return [job_of_message(raw) for raw in reversed(broker_redis.lrange(queue, 0, -1))]


def sizes(broker_redis, pool, tier="fast") -> list[int]:
    """What the messages in the queue say of how many images they are."""
    return [
        json.loads(raw)["headers"][queues.NUM_IMAGES]
        for raw in reversed(broker_redis.lrange(f"{pool}.{tier}", 0, -1))
    ]


def stamped(database, pool) -> int:
    with transaction(database.app) as session:
        return session.scalar(
            text("SELECT count(announced_at) FROM jobs WHERE pool = :pool"), {"pool": pool}
        )


def test_waiting_jobs_become_messages_in_fair_order_up_to_slots_and_one_batch(
    release, accept, pool, broker_redis, database
):
    waiting = accept(15)

    assert release.release(pool, "fast") == 12

    assert messages(broker_redis, pool) == waiting[:12]
    assert stamped(database, pool) == 12
    assert release.release(pool, "fast") == 0


def test_more_live_workers_make_more_room(release, accept, pool, database):
    accept(25)
    with transaction(database.app) as session:
        for number in range(2):
            workers.heartbeat(
                session, name=f"gpu{number}@{pool}", pool=pool, device="cpu", slots=8, facts={}
            )

    assert release.release(pool, "fast") == 20


def test_while_the_broker_is_away_jobs_wait_on_in_postgres(
    release_without_broker, release, accept, pool, broker_redis, database
):
    waiting = accept(3)

    assert release_without_broker.release(pool, "fast") == 0
    assert stamped(database, pool) == 0

    assert release.release(pool, "fast") == 3
    assert messages(broker_redis, pool) == waiting


def test_a_lost_message_is_sent_again_unless_a_worker_has_the_job(
    release, accept, pool, broker_redis, database
):
    lost, taken = accept(2)
    release.release(pool, "fast")
    broker_redis.flushdb()
    with transaction(database.app) as session:
        a_lease(session, session.get(Job, taken))

    assert release.reannounce(pool, "fast", [lost, taken]) == 1

    assert messages(broker_redis, pool) == [lost]


def dump(database, pool, count=20, **params):
    """One tenant submits that many jobs."""
    with transaction(database.app) as session:
        tenant = a_tenant(session)
        return [a_job(session, pool=pool, tenant=tenant, **params).id for _ in range(count)]


def taken(database, job_ids) -> None:
    """Workers took these: their slots are full."""
    with transaction(database.app) as session:
        for job_id in job_ids:
            a_lease(session, session.get(Job, job_id))


def test_behind_one_tenant_s_dump_another_s_job_is_sent_to_the_front_queue(
    release, pool, broker_redis, database
):
    dumped = dump(database, pool)
    release.release(pool, "fast")
    taken(database, dumped[:8])
    with transaction(database.app) as session:
        job = a_job(session, pool=pool)

    assert release.release(pool, "fast", tenant_id=job.tenant_id) == 1

    assert messages(broker_redis, pool, is_front=True) == [job.id]
    assert messages(broker_redis, pool) == dumped[:12]


def test_after_an_accept_only_that_tenant_s_jobs_are_looked_at_where_the_limit_is_reached(
    release, pool, database
):
    dumped = dump(database, pool)
    release.release(pool, "fast")
    taken(database, dumped[:8])
    with transaction(database.app) as session:
        mine, _ = a_job(session, pool=pool), a_job(session, pool=pool)

    assert release.release(pool, "fast", tenant_id=mine.tenant_id) == 1
    assert release.release(pool, "fast") == 1


def test_a_lost_message_of_the_front_queue_is_sent_there_again(
    release, pool, broker_redis, database
):
    dumped = dump(database, pool)
    release.release(pool, "fast")
    taken(database, dumped[:8])
    with transaction(database.app) as session:
        job = a_job(session, pool=pool)
    release.release(pool, "fast")
    broker_redis.flushdb()

    assert release.reannounce(pool, "fast", [job.id]) == 1

    assert (messages(broker_redis, pool, is_front=True), messages(broker_redis, pool)) == (
        [job.id],
        [],
    )


def test_while_the_broker_is_away_what_was_due_at_the_front_stays_due(
    release, release_without_broker, pool, broker_redis, database
):
    dumped = dump(database, pool)
    release.release(pool, "fast")
    taken(database, dumped[:8])
    with transaction(database.app) as session:
        job = a_job(session, pool=pool)

    assert release_without_broker.release(pool, "fast") == 0
    assert release.release(pool, "fast") == 1

    assert messages(broker_redis, pool, is_front=True) == [job.id]


def test_the_cap_of_a_tier_is_its_tenants(database, settings, broker_redis, fleet, pool):
    capped = fleet.model_copy(
        update={
            "tiers": {
                **fleet.tiers,
                "fast": fleet.tiers["fast"].model_copy(update={"max_in_hand_per_tenant": 3}),
            }
        }
    )
    release = Release(database.app, Broker(settings, capped), capped, worker_silence_s=15)
    dumped, others = dump(database, pool), dump(database, pool, 2)

    assert release.release(pool, "fast") == 5

    assert set(messages(broker_redis, pool)) == {*dumped[:3], *others}


def test_a_worker_that_leaves_passes_a_job_on_that_it_was_still_handed(
    release, accept, pool, broker_redis
):
    [job_id] = accept(1)
    release.release(pool, "fast")
    broker_redis.flushdb()

    release.return_to_queue(job_id)

    assert messages(broker_redis, pool) == [job_id]


def test_a_job_of_the_front_queue_is_passed_on_to_the_front_queue(
    release, pool, broker_redis, database
):
    dumped = dump(database, pool)
    release.release(pool, "fast")
    taken(database, dumped[:8])
    with transaction(database.app) as session:
        job = a_job(session, pool=pool)
    release.release(pool, "fast")
    broker_redis.flushdb()

    release.return_to_queue(job.id)

    assert messages(broker_redis, pool, is_front=True) == [job.id]


@pytest.mark.parametrize("state", ["running", "canceled", "unknown"])
def test_a_job_that_waits_no_more_is_not_passed_on(release, pool, broker_redis, database, state):
    job_id = uuid.uuid4()
    if state != "unknown":
        with transaction(database.app) as session:
            job = a_job(session, pool=pool)
            job_id = job.id
            if state == "running":
                a_lease(session, job)
            else:
                jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")

    release.return_to_queue(job_id)

    assert broker_redis.keys(f"{pool}*") == []


def test_every_message_says_how_many_images_it_is_however_it_came_to_be_sent(
    release, pool, broker_redis, database
):
    with transaction(database.app) as session:
        small, large = (
            a_job(session, pool=pool, num_images=images, release_tag=float(images))
            for images in (1, 3)
        )

    release.release(pool, "fast")
    release.reannounce(pool, "fast", [large.id])
    release.announce(pool, "fast", small.id, num_images=1)

    assert sizes(broker_redis, pool) == [1, 3, 3, 1]


def asked_for(broker_redis, tier="fast") -> list[uuid.UUID]:
    """The jobs whose pictures somebody is asked to bring, the first one in front."""
    queued = broker_redis.lrange(f"results.{tier}", 0, -1)
    return [job_of_message(raw) for raw in reversed(queued)]


def a_picture_job(session, pool, **params) -> Job:
    tenant = a_tenant(session)
    digest = uuid.uuid4().hex * 2
    shape = {"mode": "RGB", "size_bytes": 9, "width_px": 8, "height_px": 8, "actor": "tests"}
    own = {"tenant_id": tenant.id, "object_key": f"t/x/{digest}", "content_sha256": digest}
    file = files.keep(session, **own, **shape)
    return a_job(session, tenant=tenant, pool=pool, init_file_id=file.id, strength=0.5, **params)


def test_pictures_that_nobody_could_be_asked_for_are_asked_for_by_the_next_release(
    release_without_broker, release, pool, broker_redis, database
):
    with transaction(database.app) as session:
        ids = [a_picture_job(session, pool).id for _ in range(3)]

    assert release_without_broker.release(pool, "fast") == 0
    assert asked_for(broker_redis) == []

    release.release(pool, "fast")
    assert sorted(asked_for(broker_redis)) == sorted(ids)
    release.release(pool, "fast")
    assert len(asked_for(broker_redis)) == len(ids), "they were asked for"
