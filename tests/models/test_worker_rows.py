"""Who is alive: the rows that workers refresh, and the slots that add up."""

import uuid

import pytest
from sqlalchemy import text

from models import workers
from tests.builders import a_job


@pytest.fixture
def pool() -> str:
    return f"pool-{uuid.uuid4().hex[:8]}"


def beat(session, pool, name="gpu0", slots=16):
    workers.heartbeat(
        session, name=f"{name}@{pool}", pool=pool, device="cpu", slots=slots, facts={}
    )


def silence(session, pool, seconds):
    session.execute(
        text(
            "UPDATE workers SET seen_at = clock_timestamp() - make_interval(secs => :s) "
            "WHERE pool = :pool"
        ),
        {"s": seconds, "pool": pool},
    )


def test_the_slots_of_live_workers_add_up(session, pool):
    beat(session, pool, "gpu0", slots=16)
    beat(session, pool, "gpu1", slots=8)
    beat(session, pool, "gpu1", slots=8)

    assert workers.capacity(session, pool=pool, silent_for_s=15) == (24, 2)


def test_a_worker_that_leaves_takes_no_jobs_any_more(session, pool):
    beat(session, pool, "gpu0", slots=16)
    beat(session, pool, "gpu1", slots=0)

    assert workers.capacity(session, pool=pool, silent_for_s=15) == (16, 1)


def test_a_silent_worker_does_not_count_until_it_speaks_again(session, pool):
    beat(session, pool)
    silence(session, pool, 20)
    assert workers.capacity(session, pool=pool, silent_for_s=15) == (0, 0)

    beat(session, pool)

    assert workers.capacity(session, pool=pool, silent_for_s=15) == (16, 1)


def test_a_worker_that_leaves_is_gone_and_one_that_died_is_forgotten(session, pool):
    beat(session, pool, "gpu0")
    beat(session, pool, "gpu1")
    workers.leave(session, f"gpu0@{pool}")
    assert [
        worker.name for worker in workers.live(session, silent_for_s=15) if worker.pool == pool
    ] == [f"gpu1@{pool}"]

    silence(session, pool, 7200)
    workers.forget_the_silent(session, silent_for_s=3600)

    assert (
        session.scalar(text("SELECT count(*) FROM workers WHERE pool = :pool"), {"pool": pool}) == 0
    )


def test_a_worker_is_counted_as_live_for_as_long_as_it_said(session, pool):
    a_job(session, pool=pool)
    for name, silent_after_s in (("patient", 60.0), ("hasty", 5.0)):
        workers.heartbeat(
            session,
            name=f"{name}@{pool}",
            pool=pool,
            device="cpu",
            slots=1,
            facts={},
            silent_after_s=silent_after_s,
        )
    silence(session, pool, 20)

    assert (
        session.scalar(
            text("SELECT live_workers FROM queue_now WHERE pool = :pool"), {"pool": pool}
        )
        == 1
    )
