"""How a new job is released: at once, by a release that looks, or when its turn comes."""

import uuid

import pytest

from app.live.forecast import BookedJobs
from models import leases, tenants
from models.database import transaction
from models.tables import Job, Tenant
from policy.params import RequestedParams
from policy.release import ReleaseHint
from tests.app.moments import of_this_moment
from tests.builders import a_job, a_tenant


@pytest.fixture
def house(a_house, stack_database):
    """A worker of 8 slots, for which 4 images more may wait; jobs of the tier `batch`."""
    house = a_house().with_workers()
    parts = house.parts

    def hint(*, tenant_id=None, n=1, **fields):
        resolved = parts.resolve(
            RequestedParams(prompt="a red circle", tier="batch", n=n, **fields)
        )
        return of_this_moment(
            lambda: parts.forecaster.release_hint(resolved, tenant_id or uuid.uuid4())
        )[0]

    def announces(count):
        """Nearly as a release does: they are stamped, with no message."""
        with transaction(stack_database) as session:
            tenant = a_tenant(session)
            made = [
                a_job(session, tenant=tenant, pool=house.pool, tier="batch", predicted_s=1)
                for _ in range(count)
            ]
            for job in made:
                job.announced_at = job.accepted_at
        return made

    def place(tenant, booked):
        """Where one more job of the tenant's would stand, behind what it books."""
        resolved = parts.resolve(RequestedParams(prompt="a red circle", tier="batch"))
        expect = parts.forecaster.expect
        return of_this_moment(lambda: expect(resolved, tenant.id, booked)).place

    house.hint, house.announces, house.database = hint, announces, stack_database
    house.place, house.place_of = place, parts.forecaster.place_of
    return house


def runs(house, jobs):
    with transaction(house.database) as session:
        for job in jobs:
            taken = leases.take(
                session, job.id, worker=f"gpu0@{house.pool}", device="cpu", ttl_s=600
            )
            assert taken is not None


def test_a_job_goes_at_once_up_to_the_slots_where_nobody_waits(house):
    # alone, though of 8 slots 3 are kept for better tiers
    assert house.hint(n=8) is ReleaseHint.IMMEDIATE

    house.announces(3)

    assert house.hint(n=2) is ReleaseHint.IMMEDIATE
    assert house.hint(n=3) is ReleaseHint.TRY_RELEASE


def test_a_job_is_looked_at_where_somebody_waits_who_may_be_gone_by_then(house):
    house.waits(count=12, predicted_s=1)

    assert house.hint() is ReleaseHint.TRY_RELEASE


def test_a_job_waits_its_turn_where_more_wait_than_there_is_room_for(house):
    house.waits(count=13, predicted_s=1)

    assert house.hint() is ReleaseHint.BACKLOGGED


def test_announced_jobs_do_not_count_as_waiting(house):
    house.announces(13)

    assert house.hint() is ReleaseHint.TRY_RELEASE


def test_a_job_whose_tenant_is_behind_is_looked_at_whoever_waits(house):
    runs(house, house.announces(12))
    tenant = house.waits(count=20, predicted_s=1)

    assert house.hint() is ReleaseHint.TRY_RELEASE
    assert house.hint(tenant_id=tenant.id) is ReleaseHint.TRY_RELEASE
    with transaction(house.database) as session:
        running = (
            session.query(Job.tenant_id)
            .where(Job.pool == house.pool, Job.state == "running")
            .first()
            .tenant_id
        )
    assert house.hint(tenant_id=running) is ReleaseHint.BACKLOGGED


def test_a_job_that_starts_from_a_picture_is_looked_at(house):
    house.waits(count=13, predicted_s=1)

    assert house.hint(init_image=uuid.uuid4()) is ReleaseHint.TRY_RELEASE


def test_a_job_behind_some_that_lack_their_pictures_is_looked_at(house):
    house.waits(count=13, predicted_s=1)
    with transaction(house.database) as session:
        session.query(Job).where(Job.pool == house.pool).update({"lacks_inputs": True})

    assert house.hint() is ReleaseHint.TRY_RELEASE


def test_jobs_of_a_batch_for_another_pool_are_before_none_of_the_rest(house):
    """Of a better tier in its own pool it is: not before it in its line, but it takes its time."""
    tenant, booked = house.waits(count=1, predicted_s=1), BookedJobs(jobs=5, cost_s=100.0)
    flows = [(house.pool, "batch"), (house.pool, "fast"), ("another", "batch")]
    alone = house.place(tenant, {})

    own, better, elsewhere = (house.place(tenant, {flow: booked}) for flow in flows)

    assert own.jobs_ahead >= alone.jobs_ahead + 5
    assert better.jobs_ahead == elsewhere.jobs_ahead == alone.jobs_ahead
    assert own.eta.p50_s > alone.eta.p50_s
    assert better.eta.p50_s > alone.eta.p50_s
    assert elsewhere.eta.p50_s == pytest.approx(alone.eta.p50_s)


def test_behind_what_it_books_a_tenant_of_more_weight_has_fewer_jobs_of_others_before_it(house):
    light, heavy = (house.waits(count=1, predicted_s=1) for _ in range(2))
    with transaction(house.database) as session:
        tenants.set_weight(session, session.get_one(Tenant, heavy.id), weight=4.0, actor="tests")
    house.waits(count=20, predicted_s=1)
    booked = {(house.pool, "batch"): BookedJobs(jobs=1, cost_s=10.0)}

    light_ahead, heavy_ahead = (house.place(tenant, booked).jobs_ahead for tenant in (light, heavy))

    assert light_ahead > heavy_ahead + 4


@pytest.mark.parametrize(("steps_done", "left"), [(0, 1.0), (2, 0.5), (4, 0.0), (9, 0.0)])
def test_the_time_left_of_a_running_job_goes_down_with_its_steps(house, steps_done, left):
    [job] = house.announces(1)
    runs(house, [job])
    with transaction(house.database) as session:
        running = session.get_one(Job, job.id)
        session.refresh(running, ["images"])

    at_first, now = (house.place_of(running, steps) for steps in (0, steps_done))

    assert now.jobs_ahead is None
    assert now.eta.p50_s == pytest.approx(left * at_first.eta.p50_s)
    assert at_first.eta.p50_s > 0
