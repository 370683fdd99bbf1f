"""What a device costs under the terms of its worker, and what a job pays for it."""

from decimal import Decimal

from sqlalchemy import text

from models import leases, workers
from models.tables import Attempt, Image
from policy.workers import WorkerTerms
from tests.builders import a_lease, a_left, hand_off, preempt, store

SPOT = WorkerTerms("spot", "spot", "l40s", 0.36)
DEARER = WorkerTerms("mine", "reserved", "any", 3.6)


def test_attempt_keeps_the_terms_of_its_worker(session):
    lease = a_lease(session, terms=SPOT)

    attempt = session.get_one(Attempt, (lease.job_id, 1))

    assert (
        attempt.capacity_class,
        attempt.market,
        attempt.gpu_class,
        attempt.gpu_hour_price,
    ) == ("spot", "spot", "l40s", 0.36)


def test_job_pays_the_price_that_held_when_its_worker_took_it(session):
    lease = a_lease(session, terms=SPOT)
    hand_off(session, lease, device_seconds=3600.0)

    job = store(session, lease.job)  # the pool's own price is 1.20

    assert job.cost == Decimal("0.720000"), "0.36 an hour, twice the weight"


def test_image_that_two_classes_rendered_pays_each_its_part(session):
    lease = a_lease(session, terms=SPOT)
    preempt(session, lease, left=[a_left(device_seconds=1800.0)])
    second = a_lease(session, lease.job, terms=DEARER)
    hand_off(session, second, device_seconds=900.0)

    job = store(session, second.job, attempt=2)

    assert job.device_seconds == 2700.0
    assert job.cost == 2 * (Decimal("0.18") + Decimal("0.9"))


def test_device_time_that_came_to_nothing_is_not_paid_whoever_spent_it(session):
    lease = a_lease(session, terms=DEARER)
    preempt(session, lease, left=[a_left(device_seconds=1800.0)])
    second = a_lease(session, lease.job, terms=SPOT)
    leases.note_resumption(session, second, resumed={0: 0}, lost_steps=2)
    hand_off(session, second, device_seconds=3600.0)

    job = store(session, second.job, attempt=2)

    assert job.cost == Decimal("0.720000")


def test_images_of_workers_that_told_no_terms_pay_the_price_of_their_pool(session):
    first = a_lease(session, num_images=2)
    hand_off(session, first, 0, device_seconds=3600.0)
    store(session, first.job, 0)
    preempt(session, first)
    second = a_lease(session, first.job, terms=SPOT)
    hand_off(session, second, 1, device_seconds=3600.0)

    job = store(session, second.job, 1, attempt=2)

    assert session.get_one(Image, (job.id, 0)).device_cost is None
    assert job.cost == 2 * (Decimal("1.2") + Decimal("0.36"))


def test_slots_of_live_workers_are_told_by_class(session):
    for name, capacity_class, slots in (("a", "spot", 20), ("b", "spot", 4), ("c", "", 8)):
        workers.heartbeat(
            session,
            name=f"{name}@classes",
            pool="classes",
            capacity_class=capacity_class,
            device="cpu",
            slots=slots,
            facts={},
        )

    capacity = workers.capacity(session, pool="classes", silent_for_s=15)
    shown = session.execute(
        text("SELECT capacity_class FROM workers_now WHERE pool = 'classes' ORDER BY worker")
    )

    assert (capacity.slots, capacity.devices) == (32, 3)
    assert capacity.slots_by_class == {"spot": 24, "": 8}
    assert list(shown.scalars()) == ["spot", "spot", ""]
