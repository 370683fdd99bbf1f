"""Which waiting jobs are announced next: in fair order, never more than there is room for."""

import uuid

import pytest
from sqlalchemy import text

from models import jobs, releasing
from models.database import transaction
from models.releasing import Room
from tests.builders import a_job, a_lease, a_tenant, hand_off
from tests.models.facts import at_once


@pytest.fixture
def pool() -> str:
    """A pool that no other test knows."""
    return f"pool-{uuid.uuid4().hex[:8]}"


def pick(session, pool, limit_images, tier="fast") -> list[uuid.UUID]:
    """The jobs picked where one tenant's are as good as another's: nobody goes to the front, for nothing else is running there."""
    room = Room(slots=limit_images, limit_images=limit_images, least_share=0)
    return [job.job_id for job in releasing.pick(session, pool=pool, tier=tier, room=room) if not job.is_front]


def test_the_smallest_release_tag_comes_first_and_the_older_id_among_equals(session, pool):
    late = a_job(session, pool=pool, release_tag=3.0)
    twins = sorted(a_job(session, pool=pool, release_tag=2.0).id for _ in range(3))
    early = a_job(session, pool=pool, release_tag=1.0)

    assert pick(session, pool, limit_images=10) == [early.id, *twins, late.id]


def test_without_a_tag_of_its_own_a_job_waits_since_its_accept(session, pool):
    accepted = [a_job(session, pool=pool).id for _ in range(3)]

    assert pick(session, pool, limit_images=10) == accepted


def test_no_more_images_than_the_limit_are_let_out(session, pool):
    tenant = a_tenant(session)
    first, second, third = (a_job(session, tenant=tenant, pool=pool, num_images=2) for _ in range(3))

    assert pick(session, pool, limit_images=5) == [first.id, second.id]
    assert pick(session, pool, limit_images=5) == []
    assert pick(session, pool, limit_images=6) == [third.id]


def test_running_jobs_fill_the_room_too_and_storing_ones_do_not(session, pool):
    tenant = a_tenant(session)
    running = a_lease(session, tenant=tenant, pool=pool, num_images=2)
    waiting = a_job(session, tenant=tenant, pool=pool)
    assert pick(session, pool, limit_images=2) == []

    hand_off(session, running, 0)
    hand_off(session, running, 1)

    assert pick(session, pool, limit_images=2) == [waiting.id]


def test_the_next_in_line_is_not_overtaken_by_a_smaller_one(session, pool):
    tenant = a_tenant(session)
    a_lease(session, tenant=tenant, pool=pool, num_images=2)
    big = a_job(session, tenant=tenant, pool=pool, num_images=3, release_tag=1.0)
    a_job(session, tenant=tenant, pool=pool, num_images=1, release_tag=2.0)

    assert pick(session, pool, limit_images=4) == []
    assert pick(session, pool, limit_images=5) == [big.id]


def test_a_job_larger_than_the_limit_goes_alone(session, pool):
    big = a_job(session, pool=pool, num_images=8, release_tag=1.0)
    small = a_job(session, pool=pool, num_images=1, release_tag=2.0)

    assert pick(session, pool, limit_images=4) == [big.id]
    assert pick(session, pool, limit_images=4) == []

    jobs.cancel(session, big.id, tenant_id=big.tenant_id, actor="tests")
    assert pick(session, pool, limit_images=4) == [small.id]


def test_pools_and_tiers_have_room_of_their_own(session, pool):
    fast, batch, elsewhere = a_job(session, pool=pool), a_job(session, pool=pool, tier="batch"), a_job(session, pool=pool + "2")

    assert pick(session, pool, limit_images=1) == [fast.id]
    assert pick(session, pool, limit_images=1, tier="batch") == [batch.id]
    assert pick(session, pool + "2", limit_images=1) == [elsewhere.id]


def test_pickers_at_work_together_never_exceed_the_limit(database, pool):
    with transaction(database.app) as session:
        waiting = [a_job(session, pool=pool, release_tag=float(number)).id for number in range(12)]

    def pick_some():
        with transaction(database.app) as session:
            return pick(session, pool, limit_images=8)

    picked = at_once(*[pick_some] * 6)

    assert sorted(job_id for some in picked for job_id in some) == sorted(waiting[:8])


def test_a_stamp_that_was_withdrawn_is_given_again(session, pool):
    job = a_job(session, pool=pool)
    pick(session, pool, limit_images=4)

    releasing.withdraw(session, [job.id])

    assert pick(session, pool, limit_images=4) == [job.id]


def test_jobs_announced_long_ago_are_found_oldest_first(session, pool):
    older, newer, fresh = (a_job(session, pool=pool) for _ in range(3))
    pick(session, pool, limit_images=4)
    for job, seconds in ((older, 20), (newer, 10)):
        session.execute(
            text("UPDATE jobs SET announced_at = clock_timestamp() - make_interval(secs => :seconds) WHERE id = :id"),
            {"seconds": seconds, "id": job.id},
        )

    found = releasing.announced(session, pool=pool, tier="fast", older_than_s=5)

    assert [job.job_id for job in found] == [older.id, newer.id]
    assert releasing.announced_at(session, fresh.id) > found[0].announced_at


def test_announcing_again_leaves_out_what_a_worker_took_meanwhile(session, pool):
    waiting, running = a_job(session, pool=pool), a_lease(session, pool=pool).job

    again = releasing.announce_again(session, [waiting.id, running.id])

    assert [job.job_id for job in again] == [waiting.id]
    assert releasing.announced_at(session, waiting.id) is not None


def test_announcing_nothing_is_nothing(session):
    assert releasing.announce_again(session, []) == []


def test_the_queue_can_be_read_at_a_glance(session, pool):
    tenant = a_tenant(session)
    a_lease(session, tenant=tenant, pool=pool)
    for _ in range(3):
        a_job(session, tenant=tenant, pool=pool)
    pick(session, pool, limit_images=2)

    row = session.execute(text("SELECT * FROM queue_now WHERE pool = :pool"), {"pool": pool}).one()

    assert (row.tier, row.waiting, row.announced, row.running, row.storing, row.images) == ("fast", 2, 1, 1, 0, 4)
    assert row.oldest_wait_s >= 0
