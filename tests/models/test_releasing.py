"""Which waiting jobs are announced next: in fair order, never more than there is room for."""

import uuid
from collections import Counter

import pytest
from sqlalchemy import text

from models import jobs, leases, releasing
from models.database import transaction
from models.tables import Job
from policy.release import ReleaseLimits
from tests.builders import a_job, a_lease, a_tenant, hand_off, preempt
from tests.models.facts import at_once


@pytest.fixture
def pool() -> str:
    """A pool that no other test knows."""
    return f"pool-{uuid.uuid4().hex[:8]}"


def pick(session, pool, limit_images, tier="fast") -> list[uuid.UUID]:
    """The jobs picked where one tenant's are as good as another's.

    Nobody goes to the front, for nothing else is running there.
    """
    limits = ReleaseLimits(slots=limit_images, limit_images=limit_images, least_share=0)
    return [
        job.job_id
        for job in releasing.pick(session, pool=pool, tier=tier, limits=limits)
        if not job.is_front
    ]


def fronted(session, pool, tenant_id=None, **limits) -> list[tuple[uuid.UUID, bool]]:
    """The jobs picked, and whether each goes to the front.

    Workers hold 8 images, 4 more may wait for them.
    """
    allowed = ReleaseLimits(**{"slots": 8, "limit_images": 12, **limits})
    return [
        (job.job_id, job.is_front)
        for job in releasing.pick(
            session, pool=pool, tier="fast", limits=allowed, tenant_id=tenant_id
        )
    ]


def dump(session, pool, count, tenant=None, **params) -> list[uuid.UUID]:
    """One tenant submits that many jobs; their ids in fair order."""
    tenant = tenant or a_tenant(session)
    return [
        a_job(session, pool=pool, tenant=tenant, predicted_s=1, **params).id for _ in range(count)
    ]


def busy(session, pool, count, tenant=None, **limits) -> list[uuid.UUID]:
    """One tenant's dump, as much of it announced as there is room for and running as workers hold.

    The result is the ids of those announced.
    """
    dump(session, pool, count, tenant)
    announced = [job_id for job_id, _ in fronted(session, pool, **limits)]
    for job_id in announced[:8]:
        a_lease(session, session.get(Job, job_id))
    return announced


def end(session, *job_ids) -> None:
    query = """UPDATE jobs SET state = 'succeeded', finished_at = clock_timestamp(),
                      announced_at = NULL, lease_expires_at = NULL
               WHERE id = ANY(:ids)"""
    session.execute(text(query), {"ids": list(job_ids)})


def in_hand(session, pool) -> int:
    return releasing.outstanding_in(session, pool=pool, tier="fast").total_images


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
    first, second, third = (
        a_job(session, tenant=tenant, pool=pool, num_images=2) for _ in range(3)
    )

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
    fast, batch, elsewhere = (
        a_job(session, pool=pool),
        a_job(session, pool=pool, tier="batch"),
        a_job(session, pool=pool + "2"),
    )

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
            text(
                "UPDATE jobs "
                "SET announced_at = clock_timestamp() - make_interval(secs => :seconds) "
                "WHERE id = :id"
            ),
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

    assert (row.tier, row.waiting, row.announced, row.running, row.storing, row.images) == (
        "fast",
        2,
        1,
        1,
        0,
        4,
    )
    assert row.oldest_wait_s >= 0


def test_running_work_is_told_by_tier_in_device_seconds_and_images(session, pool):
    tenant = a_tenant(session)
    a_lease(session, pool=pool, tenant=tenant, num_images=2, predicted_s=3)
    dump(session, pool, 3, tenant)
    pick(session, pool, limit_images=4)

    fast = releasing.outstanding_by_tier(session, pool=pool)["fast"]
    assert (fast.running, fast.running_s, fast.announced_jobs) == ({tenant.id: 2}, 3, 2)
    assert fast.images == {tenant.id: 4}
    assert in_hand(session, pool) == 4


def test_while_one_tenant_s_dump_takes_all_room_another_s_job_goes_to_the_front_at_once(
    session, pool
):
    assert len(busy(session, pool, 100)) == 12

    job = a_job(session, pool=pool)

    assert fronted(session, pool) == [(job.id, True)]
    assert fronted(session, pool) == []


def test_whose_jobs_only_stand_in_line_is_passed_by_nobody(session, pool):
    dump(session, pool, 100)
    fronted(session, pool)

    a_job(session, pool=pool)

    assert fronted(session, pool) == []


def test_a_crowd_of_small_tenants_does_not_keep_a_large_one_from_its_share(session, pool):
    """A worker of 8 slots that takes from the front first, and up to twice as many from there;
    whose job ends asks for the next.
    """
    large, small = a_tenant(session), [a_tenant(session) for _ in range(12)]
    dump(session, pool, 40, large)
    owner, front, line, runs = {}, [], [], []

    def release():
        for job_id, is_front in fronted(session, pool, least_share=4):
            (front if is_front else line).append(job_id)

    for tenant in small:
        dump(session, pool, 1, tenant)
    served = Counter()
    for _ in range(40):
        release()
        while front and len(runs) < 16:
            runs.append(front.pop(0))
        while line and len(runs) < 8:
            runs.append(line.pop(0))
        for job_id in runs:
            job = session.get(Job, job_id)
            if job.state == "queued":
                a_lease(session, job)
            owner[job_id] = job.tenant_id
        ended, runs = runs[:2], runs[2:]
        end(session, *ended)
        for job_id in ended:
            served[owner[job_id]] += 1
            if owner[job_id] != large.id:
                dump(
                    session, pool, 1, next(tenant for tenant in small if tenant.id == owner[job_id])
                )

    fair = served.total() / 13
    assert served[large.id] >= 0.6 * fair
    assert min(served[tenant.id] for tenant in small) >= 0.5 * fair


def test_a_newcomer_goes_to_the_front_also_when_workers_are_full_and_room_is_left(session, pool):
    busy(session, pool, 10)

    job = a_job(session, pool=pool)

    assert fronted(session, pool) == [(job.id, True)]


def test_while_workers_have_slots_nobody_goes_to_the_front(session, pool):
    dump(session, pool, 5)
    fronted(session, pool)

    job = a_job(session, pool=pool)

    assert fronted(session, pool) == [(job.id, False)]


def test_to_the_front_go_half_of_one_s_fair_share_at_most(session, pool):
    busy(session, pool, 100)

    mine = dump(session, pool, 100)

    # Two share 12 images: 6 are fair, and half of them at the front.
    assert fronted(session, pool) == [(job_id, True) for job_id in mine[:3]]
    assert fronted(session, pool) == []


def test_with_the_front_no_more_than_twice_the_limit_is_in_hand(session, pool):
    busy(session, pool, 100)
    for _ in range(30):
        a_job(session, pool=pool)

    assert [is_front for _, is_front in fronted(session, pool)] == [True] * 12

    assert in_hand(session, pool) == 24
    assert fronted(session, pool) == []


def test_after_an_accept_only_the_tenant_s_own_jobs_are_looked_at_when_there_is_no_room(
    session, pool
):
    busy(session, pool, 100)
    mine, another_s = a_job(session, pool=pool), a_job(session, pool=pool)

    assert fronted(session, pool, tenant_id=mine.tenant_id) == [(mine.id, True)]
    assert fronted(session, pool) == [(another_s.id, True)]


@pytest.mark.parametrize("limit_images", [12, 11], ids=["with room", "without room"])
def test_a_job_that_comes_back_from_a_worker_goes_to_the_front_whoever_s_it_is(
    session, pool, limit_images
):
    tenant = a_tenant(session)
    running = a_lease(session, pool=pool, tenant=tenant, predicted_s=1)
    dump(session, pool, 100, tenant)
    fronted(session, pool)

    preempt(session, running)

    assert fronted(session, pool, limit_images=limit_images) == [(running.job_id, True)]


def test_two_who_always_have_work_do_not_meet_at_the_front(session, pool):
    dump(session, pool, 40)
    dump(session, pool, 40)

    out = fronted(session, pool)
    fronts = [is_front for _, is_front in out]
    while out:
        end(session, out.pop(0)[0])
        more = fronted(session, pool)
        fronts += [is_front for _, is_front in more]
        out += more

    assert fronts == [False] * 80


def test_a_tenant_never_has_more_in_hand_than_its_cap_and_lets_the_others_pass(session, pool):
    dumped = dump(session, pool, 100)
    others = dump(session, pool, 3, release_tag=1e10)

    assert fronted(session, pool, max_per_tenant=4) == [
        (job_id, False) for job_id in (*dumped[:4], *others)
    ]

    assert fronted(session, pool, max_per_tenant=4) == []
    end(session, dumped[0])
    assert fronted(session, pool, max_per_tenant=4) == [(dumped[4], False)]


def test_a_tenant_that_comes_after_capped_ones_passes_their_backlog(session, pool):
    dump(session, pool, 100)
    fronted(session, pool, max_per_tenant=4)

    others = dump(session, pool, 3, release_tag=1e10)

    assert fronted(session, pool, max_per_tenant=4) == [(job_id, False) for job_id in others]


def test_a_job_larger_than_the_cap_goes_when_its_tenant_has_nothing_in_hand(session, pool):
    tenant = a_tenant(session)
    [small] = dump(session, pool, 1, tenant)
    [large] = dump(session, pool, 1, tenant, num_images=6)

    assert fronted(session, pool, max_per_tenant=4) == [(small, False)]
    end(session, small)

    assert fronted(session, pool, max_per_tenant=4) == [(large, False)]


def test_the_cap_holds_at_the_front_too(session, pool):
    [job_id] = dump(session, pool, 1, num_images=12)
    fronted(session, pool, max_per_tenant=1)
    a_lease(session, session.get(Job, job_id))

    mine = dump(session, pool, 5)

    assert fronted(session, pool, max_per_tenant=1) == [(mine[0], True)]
    assert fronted(session, pool, max_per_tenant=1) == []


def test_nothing_is_picked_twice_by_pickers_at_work_together_not_even_for_the_front(database, pool):
    with transaction(database.app) as session:
        announced = busy(session, pool, 40)
        for _ in range(20):
            a_job(session, pool=pool)

    def pick_some():
        with transaction(database.app) as session:
            return fronted(session, pool)

    picked = [*announced, *(job_id for some in at_once(*[pick_some] * 6) for job_id, _ in some)]

    assert len(picked) == len(set(picked))
    with transaction(database.app) as session:
        assert len(picked) == in_hand(session, pool) <= 24


def test_a_lost_front_message_is_sent_there_again_and_a_withdrawn_one_begins_anew(session, pool):
    busy(session, pool, 100)
    job = a_job(session, pool=pool)
    fronted(session, pool)

    [again] = releasing.announce_again(session, [job.id])
    assert again.is_front
    assert [
        announced.is_front
        for announced in releasing.announced(session, pool=pool, tier="fast", older_than_s=-1)
    ].count(True) == 1

    releasing.withdraw(session, [job.id])
    session.refresh(job)
    assert (job.announced_at, job.is_front) == (None, False)


def test_a_job_that_is_given_back_is_at_the_front_no_more_until_it_is_picked_again(session, pool):
    busy(session, pool, 100)
    job = a_job(session, pool=pool)
    fronted(session, pool)

    leases.give_back(session, a_lease(session, job), reason="drain")

    assert (job.is_front, job.announced_at) == (False, None)
    assert fronted(session, pool) == [(job.id, True)]


def may_pass(session, pool, *, tenant=None, num_images=1, **limits) -> bool:
    """Workers hold 8 images; 4 more may wait for them."""
    allowed = ReleaseLimits(**{"slots": 8, "limit_images": 12, **limits})
    tenant_id = (tenant or a_tenant(session)).id
    return releasing.may_pass_at_once(
        session, pool=pool, tier="fast", limits=allowed, tenant_id=tenant_id, num_images=num_images
    )


def test_a_new_job_may_pass_at_once_up_to_the_slots_and_no_further(session, pool):
    dump(session, pool, 6)
    fronted(session, pool)

    assert may_pass(session, pool, num_images=2)
    assert not may_pass(session, pool, num_images=3)


def test_a_new_job_that_is_larger_than_the_slots_may_pass_where_nothing_is_in_hand(session, pool):
    assert may_pass(session, pool, num_images=9)

    a_lease(session, pool=pool)

    assert not may_pass(session, pool, num_images=9)


def test_a_new_job_may_not_pass_while_one_waits(session, pool):
    a_job(session, pool=pool + "2")
    a_job(session, pool=pool, tier="batch")
    assert may_pass(session, pool)

    a_job(session, pool=pool)

    assert not may_pass(session, pool)


def test_a_new_job_passes_one_that_lacks_its_pictures(session, pool):
    job = a_job(session, pool=pool)
    session.execute(text("UPDATE jobs SET lacks_inputs = true WHERE id = :id"), {"id": job.id})

    assert may_pass(session, pool)


def test_a_new_job_may_not_pass_beyond_its_tenant_s_cap(session, pool):
    tenant = a_tenant(session)
    dump(session, pool, 3, tenant)
    fronted(session, pool)

    assert may_pass(session, pool, tenant=tenant, max_per_tenant=4)
    assert not may_pass(session, pool, tenant=tenant, max_per_tenant=4, num_images=2)
    assert may_pass(session, pool, max_per_tenant=4, num_images=2)
    assert may_pass(session, pool, max_per_tenant=1, num_images=2)


def test_a_new_job_may_not_pass_while_another_release_is_at_work(database, session, pool):
    with transaction(database.app) as other:
        fronted(other, pool)

        assert not may_pass(session, pool)

    assert may_pass(session, pool)


def test_no_release_is_at_work_beside_one_that_lets_a_new_job_pass(database, session, pool):
    assert may_pass(session, pool)

    with transaction(database.app) as other:
        assert not may_pass(other, pool)
