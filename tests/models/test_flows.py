"""Fair order over tenants: start-time fair queuing in the database, and the sums that spare
everybody the counting.
"""

import random
import uuid
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text
from sqlalchemy.orm import Session

from models import flows, jobs, leases, releasing
from models.database import transaction
from models.jobs import JobAlreadyFinished
from models.tables import Image, Job
from policy.failures import FailureCode
from policy.release import ReleaseLimits
from policy.states import ImageState, JobState
from tests.builders import a_job, a_lease, a_left, a_tenant, hand_off, preempt, store
from tests.models.facts import at_once

A_MICROSECOND = 1e-6  # tags begin at the wall clock: a double holds them to a quarter of that
# a share so large that nobody is below half of it: nobody goes to the front
FAIR_ORDER_ALONE = 1_000_000


@pytest.fixture
def pool() -> str:
    return a_pool()


def a_pool() -> str:
    """A pool that no other test knows."""
    return f"pool-{uuid.uuid4().hex[:8]}"


def release(session, pool, limit_images, **more):
    """The next jobs, in the order in which they are let out."""
    limits = ReleaseLimits(slots=limit_images, limit_images=limit_images, **more)
    return [job.job_id for job in releasing.pick(session, pool=pool, tier="fast", limits=limits)]


def end(session, job_ids):
    """The jobs succeed, having taken what was predicted."""
    query = (
        "UPDATE jobs SET state = 'succeeded', finished_at = clock_timestamp() WHERE id = ANY(:ids)"
    )
    session.execute(text(query), {"ids": list(job_ids)})


def render_and_store(session, job, device_seconds):
    """The job succeeds, each of its images having taken `device_seconds`."""
    lease = a_lease(session, job)
    for index in lease.pending:
        hand_off(session, lease, index, device_seconds=device_seconds)
        store(session, job, index, attempt=lease.attempt)


def virtual_s(session, pool) -> float:
    return flows.clocks(session, pool=pool)["fast"]


def after(job, earlier) -> float:
    """How far behind `earlier` the job stands in fair order, in virtual seconds."""
    return pytest.approx(job.release_tag - earlier.release_tag, abs=A_MICROSECOND)


def test_a_tenant_s_jobs_stand_as_far_apart_as_they_cost_by_its_weight(session, pool):
    heavy, light = a_tenant(session, weight=2), a_tenant(session, weight=0.5)

    first, second, third = (
        a_job(session, pool=pool, tenant=heavy, predicted_s=cost_s) for cost_s in (4, 10, 1)
    )
    alone, next_one = (a_job(session, pool=pool, tenant=light, predicted_s=3) for _ in range(2))

    assert (after(second, first), after(third, second), after(next_one, alone)) == (2, 5, 6)


def test_of_two_who_always_have_work_the_one_of_twice_the_weight_is_given_twice_as_many_images(
    session, pool
):
    chance = random.Random(7)
    one, two = a_tenant(session, weight=1), a_tenant(session, weight=2)
    accepted = {}
    for tenant, count in ((one, 25), (two, 45)):
        for num_images in chance.choices((1, 2, 3), k=count):
            job = a_job(
                session,
                pool=pool,
                tenant=tenant,
                num_images=num_images,
                predicted_s=0.5 * num_images,
            )
            accepted[job.id] = job

    given, out = Counter(), deque(release(session, pool, limit_images=6))
    while given.total() < 75:
        job = accepted[out.popleft()]
        given[job.tenant_id] += job.num_images
        render_and_store(session, job, device_seconds=0.5)
        out.extend(release(session, pool, limit_images=6))

        # Textbook: in device seconds by weight 1.5 / 1 + 1.5 / 2 apart at most, 0.5 s an image; and
        # 6 images are still out.
        assert abs(given[one.id] - given[two.id] / 2) <= 4.5 + 6

    assert given[two.id] / given[one.id] == pytest.approx(2, rel=0.25)


COSTS_S = st.lists(st.floats(0.1, 20), min_size=6, max_size=12)


@settings(max_examples=8, deadline=None)
@given(
    weights=st.tuples(st.floats(0.25, 4), st.floats(0.25, 4)),
    costs_s=st.tuples(COSTS_S, COSTS_S),
    limit_images=st.integers(1, 3),
)
def test_two_busy_tenants_never_differ_by_weight_by_more_than_a_largest_job_of_each(
    database, weights, costs_s, limit_images
):
    with Session(database.app) as session:
        pool, tenants = a_pool(), [a_tenant(session, weight=weight) for weight in weights]
        a_job(session, pool=pool)
        # from here on there is a virtual time, at which both begin
        end(session, release(session, pool, limit_images))
        owners, costs, waiting = {}, {}, Counter()
        yet_to_come = [deque(costs) for costs in costs_s]

        def accept():
            for who, tenant in enumerate(tenants):
                while yet_to_come[who] and waiting[who] <= limit_images:
                    cost_s = yet_to_come[who].popleft()
                    job = a_job(session, pool=pool, tenant=tenant, predicted_s=cost_s)
                    owners[job.id], costs[job.id] = who, cost_s
                    waiting[who] += 1

        accept()
        aheads_s = [0.0]  # of what the first was given by its weight, over the second
        while min(waiting[0], waiting[1]) > limit_images:
            released = release(session, pool, limit_images, least_share=FAIR_ORDER_ALONE)
            for job_id in released:
                who = owners[job_id]
                waiting[who] -= 1
                aheads_s.append(
                    aheads_s[-1] + (1 if who == 0 else -1) * costs[job_id] / weights[who]
                )
            end(session, released)
            accept()

    # Of any stretch of time, not only from the beginning (Goyal, Vin, Cheng 1996, theorem 1).
    largest_s = [max(costs) / weight for costs, weight in zip(costs_s, weights, strict=True)]
    assert max(aheads_s) - min(aheads_s) <= sum(largest_s) + 1e-4
    assert len(aheads_s) > 3


def test_a_tenant_who_was_away_starts_level_with_the_others(session, pool):
    away, busy = a_tenant(session), a_tenant(session)
    render_and_store(
        session, a_job(session, pool=pool, tenant=away, predicted_s=1), device_seconds=1
    )
    work = [a_job(session, pool=pool, tenant=busy, predicted_s=100) for _ in range(6)]
    end(session, release(session, pool, limit_images=4))

    back = a_job(session, pool=pool, tenant=away, predicted_s=1)

    assert back.release_tag == pytest.approx(work[3].release_tag, abs=A_MICROSECOND)
    assert release(session, pool, limit_images=2) == [back.id, work[4].id]


def test_a_tenant_that_was_away_has_nothing_saved_up(session, pool):
    away, busy = a_tenant(session), a_tenant(session)
    work = [a_job(session, pool=pool, tenant=busy, predicted_s=10) for _ in range(8)]
    end(session, release(session, pool, limit_images=4))

    back = [a_job(session, pool=pool, tenant=away, predicted_s=11) for _ in range(4)]

    taking_turns = [job.id for pair in zip(back, work[4:], strict=True) for job in pair]
    assert release(session, pool, limit_images=8, least_share=FAIR_ORDER_ALONE) == taking_turns


@pytest.mark.parametrize("ending", ["canceled", "expired"])
def test_a_job_that_ends_before_it_began_gives_its_place_back(session, pool, ending):
    tenant = a_tenant(session, weight=2)
    first = a_job(session, pool=pool, tenant=tenant, predicted_s=10)
    unwanted = a_job(
        session,
        pool=pool,
        tenant=tenant,
        predicted_s=30,
        start_within_s=600 if ending == "canceled" else -1,
    )

    ended = (
        jobs.cancel(session, unwanted.id, tenant_id=tenant.id, actor="tests")
        if ending == "canceled"
        else jobs.expire(session, unwanted.id)
    )

    assert ended.state == ending
    assert after(a_job(session, pool=pool, tenant=tenant), first) == 5


def test_a_job_that_began_and_came_to_nothing_costs_its_place_all_the_same(session, pool):
    tenant = a_tenant(session)
    begun = a_job(session, pool=pool, tenant=tenant, predicted_s=30)
    a_lease(session, begun)

    jobs.cancel(session, begun.id, tenant_id=tenant.id, actor="tests")

    assert after(a_job(session, pool=pool, tenant=tenant), begun) == 30


@pytest.mark.parametrize(("took_s", "moved_s"), [(2, -4), (14, 2), (10, 0)])
def test_a_job_s_real_cost_moves_its_tenant_s_later_jobs_and_nobody_else_s(
    session, pool, took_s, moved_s
):
    tenant, other = a_tenant(session, weight=2), a_tenant(session, weight=2)
    job, waiting = (a_job(session, pool=pool, tenant=tenant, predicted_s=10) for _ in range(2))
    other_s = a_job(session, pool=pool, tenant=other, predicted_s=10)
    kept = waiting.release_tag

    render_and_store(session, job, device_seconds=took_s)

    assert after(a_job(session, pool=pool, tenant=tenant), job) == 10 + moved_s
    assert after(a_job(session, pool=pool, tenant=other), other_s) == 5
    session.refresh(waiting)
    assert waiting.release_tag == kept


def test_virtual_time_never_goes_back(session, pool):
    for start_tag in (5.0, 3.0, 8.0, -1.0):
        flows.advance(session, pool=pool, tier="fast", start_tag=start_tag)

    assert flows.clocks(session, pool=pool) == {"fast": 8.0}


def test_a_late_job_of_an_early_place_does_not_set_virtual_time_back(session, pool):
    early, late = (a_job(session, pool=pool, release_tag=tag) for tag in (1.0, 9.0))
    session.execute(
        text("UPDATE jobs SET announced_at = clock_timestamp() WHERE id = :id"), {"id": early.id}
    )
    release(session, pool, limit_images=8)
    releasing.withdraw(session, [early.id])

    assert release(session, pool, limit_images=8) == [early.id]

    assert virtual_s(session, pool) == late.release_tag == 9.0


def test_jobs_at_the_front_out_of_turn_do_not_carry_virtual_time_past_waiting_ones(session, pool):
    dump, light = a_tenant(session), a_tenant(session, weight=0.01)
    waiting = [a_job(session, pool=pool, tenant=dump, predicted_s=1) for _ in range(20)]
    for job_id in release(session, pool, limit_images=12):
        a_lease(session, session.get(Job, job_id))
    ahead = [a_job(session, pool=pool, tenant=light, predicted_s=1) for _ in range(3)]
    assert release(session, pool, limit_images=12) == [job.id for job in ahead]

    newcomer = a_job(session, pool=pool)

    assert ahead[2].release_tag > waiting[19].release_tag
    assert newcomer.release_tag < waiting[12].release_tag


def test_pools_and_tiers_have_clocks_and_places_of_their_own(session, pool):
    tenant = a_tenant(session)
    a_job(session, pool=pool, tenant=tenant, predicted_s=1000)
    release(session, pool, limit_images=8)

    first, second = (
        a_job(session, pool=pool, tier="batch", tenant=tenant, predicted_s=1) for _ in range(2)
    )

    assert after(second, first) == 1
    assert list(flows.clocks(session, pool=pool)) == ["fast"]


def test_accepted_at_the_same_moment_no_two_jobs_of_a_tenant_share_a_place(database, pool):
    with transaction(database.app) as session:
        tenant = a_tenant(session)
        first = a_job(session, pool=pool, tenant=tenant, predicted_s=2)

    def accept():
        with transaction(database.app) as session:
            return a_job(session, pool=pool, tenant=tenant, predicted_s=2)

    places = sorted(job.release_tag - first.release_tag for job in at_once(*[accept] * 8))

    assert places == pytest.approx([2 * number for number in range(1, 9)], abs=1e-5)


def test_a_standing_is_what_a_tenant_has_waiting(session, pool):
    tenant = a_tenant(session, weight=3)
    first, second = (
        a_job(session, pool=pool, tenant=tenant, predicted_s=4, num_images=2) for _ in range(2)
    )
    a_lease(session, first)

    [standing] = flows.backlogs(session, pool=pool)

    assert (standing.tier, standing.tenant_id, standing.weight) == ("fast", tenant.id, 3)
    assert (standing.queued_jobs, standing.queued_s) == (1, 4)
    assert standing.finish_tag == pytest.approx(second.release_tag + 4 / 3, abs=A_MICROSECOND)


def test_a_tenant_with_nothing_waiting_does_not_stand_in_line(session, pool):
    job = a_job(session, pool=pool, predicted_s=0.1)
    a_lease(session, job)

    assert flows.backlogs(session, pool=pool) == []
    assert (
        session.scalar(text("SELECT queued_s FROM flows WHERE pool = :pool"), {"pool": pool}) == 0
    )


def test_fractions_leave_nothing_behind_in_an_empty_flow(session, pool):
    tenant = a_tenant(session)
    waiting = [
        a_job(session, pool=pool, tenant=tenant, predicted_s=cost_s) for cost_s in (0.1, 0.2, 0.3)
    ]
    assert (0.1 + 0.2 + 0.3) - 0.1 - 0.2 - 0.3 != 0

    for job in waiting:
        a_lease(session, job)

    assert (
        session.scalar(text("SELECT queued_s FROM flows WHERE pool = :pool"), {"pool": pool}) == 0
    )


def test_the_line_can_be_read_at_a_glance(session, pool):
    tenant = a_tenant(session, weight=2)
    for _ in range(3):
        a_job(session, pool=pool, tenant=tenant, predicted_s=4, num_images=2)
    release(session, pool, limit_images=2)

    row = session.execute(text("SELECT * FROM flows_now WHERE pool = :pool"), {"pool": pool}).one()

    assert (row.tier, row.tenant, row.weight, row.queued_jobs, row.queued_images) == (
        "fast",
        tenant.name,
        2,
        3,
        6,
    )
    assert (row.queued_gpu_s, row.ahead_s) == (12, 6)


class Happenings:
    """Jobs of two tenants in two tiers, to which anything may happen.

    Each act takes a number and makes its choices by it.
    """

    def __init__(self, session) -> None:
        self.session, self.pool = session, a_pool()
        self.tenants = [a_tenant(session), a_tenant(session, weight=2)]
        self.jobs, self.leases = [], {}

    def accept(self, n):
        self.jobs.append(
            a_job(
                self.session,
                pool=self.pool,
                tier=("fast", "batch")[n % 2],
                tenant=self.tenants[n // 2 % 2],
                num_images=1 + n % 3,
                predicted_s=(n % 70) / 7,
                start_within_s=-1 if n % 5 == 0 else 600,
                run_within_s=0 if n % 4 == 0 else 600,
            )
        )

    def pick(self, n):
        limits = ReleaseLimits(slots=2, limit_images=3 + n % 3, max_per_tenant=3 if n % 2 else None)
        releasing.pick(self.session, pool=self.pool, tier=("fast", "batch")[n % 2], limits=limits)

    def withdraw(self, n):
        if job := self._one(n, JobState.QUEUED):
            releasing.withdraw(self.session, [job.id])

    def take(self, n):
        if job := self._one(n, JobState.QUEUED):
            lease = leases.take(
                self.session,
                job.id,
                worker="gpu0@here",
                device="cpu",
                ttl_s=-1 if n % 3 == 0 else 60,
            )
            if lease is not None:
                self.leases[job.id] = lease

    def hand_off(self, n):
        if (job := self._one(n, JobState.RUNNING)) and (
            index := self._image_of(job, ImageState.PENDING)
        ) is not None:
            hand_off(self.session, self.leases[job.id], index)

    def store(self, n):
        if (job := self._one(n, *JobState)) and (
            index := self._image_of(job, ImageState.HANDED_OFF)
        ) is not None:
            store(self.session, job, index, attempt=jobs.handed_off(self.session, job.id)[index])

    def lose_hand_off(self, n):
        if job := self._one(n, *JobState):
            there = jobs.handed_off(self.session, job.id)
            leases.lose_hand_off(self.session, job.id, list(there), attempt_of=there)

    def give_back(self, n):
        if job := self._one(n, JobState.RUNNING):
            leases.give_back(self.session, self.leases[job.id], reason="drain")

    def preempt(self, n):
        if job := self._one(n, JobState.RUNNING):
            index = self._image_of(job, ImageState.PENDING)
            preempt(
                self.session, self.leases[job.id], left=[] if index is None else [a_left(index)]
            )

    def count_error(self, n):
        if job := self._one(n, JobState.RUNNING):
            leases.count_error(self.session, self.leases[job.id], detail="x", max_attempts=2)

    def fail(self, n):
        if job := self._one(n, JobState.RUNNING):
            leases.fail(self.session, self.leases[job.id], code=FailureCode.INTERNAL, detail="x")

    def lose(self, n):
        if job := self._one(n, JobState.RUNNING):
            leases.lose(self.session, job.id, max_attempts=2, worker="gpu0@here" if n % 2 else None)

    def cancel(self, n):
        if job := self._one(n, JobState.QUEUED, JobState.RUNNING, JobState.STORING):
            jobs.cancel(self.session, job.id, tenant_id=job.tenant_id, actor="tests")

    def expire(self, n):
        if job := self._one(n, JobState.QUEUED):
            jobs.expire(self.session, job.id)

    def overrun(self, n):
        if job := self._one(n, JobState.QUEUED):
            jobs.fail_past_deadline(self.session, job.id)

    def requeue(self, n):
        if job := self._one(n, JobState.FAILED):
            try:
                self.jobs.append(
                    jobs.requeue_dead(self.session, job.id, start_within_s=600, actor="tests")
                )
            except JobAlreadyFinished:
                return

    def _one(self, n, *states):
        those = [job for job in self.jobs if job.state in states]
        return those[n % len(those)] if those else None

    def _image_of(self, job, state):
        return next(
            (
                i
                for i in range(job.num_images)
                if self.session.get_one(Image, (job.id, i)).state == state
            ),
            None,
        )


ACTS = sorted(name for name in vars(Happenings) if not name.startswith("_"))
OFTEN = ["accept", "accept", "pick", "take", "take", "hand_off", "hand_off", "store"]
ACTS_BY_CHANCE = st.lists(
    st.tuples(st.sampled_from(OFTEN + ACTS), st.integers(0, 10_000)), min_size=30, max_size=60
)


@settings(max_examples=6, deadline=None)
@given(acts=ACTS_BY_CHANCE)
def test_whatever_happens_the_sums_are_what_counting_the_rows_gives(database, acts):
    with Session(database.app, expire_on_commit=False) as session:
        happenings, clock = Happenings(session), {}

        for act, number in [("accept", 1), ("accept", 4), *acts]:
            getattr(happenings, act)(number)
            now = flows.clocks(session, pool=happenings.pool)
            assert all(now[tier] >= before for tier, before in clock.items())
            clock = now

        assert sums(session, happenings.pool) == counted_sums(session, happenings.pool)
        assert queue_now(session, happenings.pool) == counted_queue(session, happenings.pool)


def sums(session, pool):
    query = (
        "SELECT tier, tenant_id, queued_jobs, queued_images, queued_s FROM flows "
        "WHERE pool = :pool AND queued_jobs <> 0"
    )
    return {
        (tier, tenant): (count, images, pytest.approx(cost))
        for tier, tenant, count, images, cost in rows(session, query, pool)
    }


def counted_sums(session, pool):
    query = """SELECT tier, tenant_id, count(*), sum(num_images), sum(predicted_s) FROM jobs
               WHERE pool = :pool AND state = 'queued' GROUP BY 1, 2"""
    return {
        (tier, tenant): (count, images, cost)
        for tier, tenant, count, images, cost in rows(session, query, pool)
    }


def queue_now(session, pool):
    query = (
        "SELECT tier, waiting, announced, running, storing, images, oldest_wait_s IS NULL "
        "FROM queue_now WHERE pool = :pool"
    )
    return sorted(rows(session, query, pool))


def counted_queue(session, pool):
    query = """SELECT tier,
                      count(*) FILTER (WHERE state = 'queued' AND announced_at IS NULL),
                      count(*) FILTER (WHERE state = 'queued' AND announced_at IS NOT NULL),
                      count(*) FILTER (WHERE state = 'running'),
                      count(*) FILTER (WHERE state = 'storing'),
                      sum(num_images),
                      NOT bool_or(state = 'queued')
               FROM jobs WHERE pool = :pool AND state IN ('queued', 'running', 'storing')
               GROUP BY tier"""
    return sorted(rows(session, query, pool))


def rows(session, query, pool):
    session.flush()
    return [tuple(row) for row in session.execute(text(query), {"pool": pool})]
