"""The ledger is what the rows say.

What is stored is settled, what a canceled job had done is abandoned, whatever became of the job.
"""

import random
from contextlib import suppress
from dataclasses import replace
from decimal import ROUND_DOWN, Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import text

from models import erasing, jobs, leases, usage
from models.leases import LeaseLost
from models.tables import Job, UsageDay
from models.usage import Shares
from policy.failures import FailureCode
from policy.states import ACTIVE_STATES
from settings import REPO
from tests.builders import a_lease, a_left, a_tenant, hand_off, preempt, resolved, store

NUM_STEPS, NUM_IMAGES = 10, 4
JOB = Decimal("1.000001")  # megapixel-steps, which no number of images divides
MICRO = Decimal("0.000001")
CHECK = text(
    (REPO / "docs/cost.md")
    .read_text()
    .partition("```sql")[2]
    .partition("```")[0]
    .strip()
    .rstrip(";")
)


def a_counted_job(session, tenant, *, steps_per_image=None, **params) -> Job:
    shape = {"num_images": NUM_IMAGES, "num_steps": NUM_STEPS}
    new_job = jobs.NewJob(
        params=replace(resolved(), **shape, **params),
        start_within_s=600,
        run_within_s=60.0,
        megapixel_steps=JOB,
        steps_per_image=steps_per_image,
    )
    return jobs.accept(
        session, new_job, tenant_id=tenant.id, api_key_id=None, currency="EUR", actor="tests"
    )


def day_of(session, tenant) -> UsageDay:
    session.expire_all()
    return session.get_one(
        UsageDay,
        (tenant.id, session.scalar(text("SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date"))),
    )


def booked(session, tenant) -> tuple[Decimal, Decimal, Decimal, Decimal]:
    """Reserved, settled, abandoned, cost."""
    day = day_of(session, tenant)
    return day.reserved, day.settled, day.abandoned, day.cost


def cancel(session, job) -> Job:
    return jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")


def fail(session, lease) -> Job:
    return leases.fail(session, lease, code=FailureCode.NOT_FINITE, detail="NaN")


def hand_on(session, lease, index) -> None:
    hand_off(session, lease, index, num_steps=NUM_STEPS, steps=NUM_STEPS)


def last_facts(session, job, event) -> dict:
    query = (
        "SELECT facts FROM audit_log WHERE job_id = :id AND event = :event ORDER BY seq DESC "
        "LIMIT 1"
    )
    return session.scalar(text(query), {"id": job.id, "event": event})


def share(images) -> Decimal:
    return (JOB * images / NUM_IMAGES).quantize(MICRO, rounding=ROUND_DOWN)


def work(steps) -> Decimal:
    return (JOB * steps / (NUM_IMAGES * NUM_STEPS)).quantize(MICRO, rounding=ROUND_DOWN)


def test_a_canceled_job_s_stored_images_are_paid_and_its_other_work_is_counted(
    session,
):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant)
    lease = a_lease(session, job)
    for index in range(3):
        hand_on(session, lease, index)
    store(session, job, 0)
    store(session, job, 1)

    canceled = cancel(session, job)

    assert (canceled.state, canceled.device_seconds) == ("canceled", 1.0)
    assert canceled.cost > 0
    assert booked(session, tenant) == (0, share(2), work(NUM_STEPS), canceled.cost)
    assert day_of(session, tenant).jobs_succeeded == 0
    came_to = {
        "images_stored": 2,
        "settled": str(share(2)),
        "abandoned": str(work(NUM_STEPS)),
        "cost": str(canceled.cost),
    }
    assert last_facts(session, job, "job:state:canceled") == {
        "was": "running",
        "currency": "EUR",
        **came_to,
    }


@pytest.mark.parametrize("ends", ["fails", "is tried too often", "runs too long"])
def test_a_failed_job_s_stored_images_are_paid_and_counted_and_nothing_else(session, ends):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant)
    lease = a_lease(session, job)
    for index in range(2):
        hand_on(session, lease, index)
    store(session, job, 0)

    if ends == "fails":
        fail(session, lease)
    elif ends == "is tried too often":
        leases.count_error(session, lease, detail="no", max_attempts=1)
    else:
        leases.give_back(session, lease, reason="drain")
        session.execute(
            text("UPDATE jobs SET run_by = clock_timestamp() - interval '1 s' WHERE id = :id"),
            {"id": job.id},
        )
        jobs.fail_past_deadline(session, job.id)

    session.refresh(job)
    assert (job.state, job.cost > 0) == ("failed", True)
    assert booked(session, tenant) == (0, share(1), 0, job.cost)
    assert last_facts(session, job, "job:state:failed")["images_stored"] == 1


def test_an_erased_job_s_stored_images_are_paid_all_the_same(session):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant)
    lease = a_lease(session, job)
    hand_on(session, lease, 0)
    store(session, job, 0)

    erasing.erase(session, job.id, tenant_id=tenant.id, actor="tests")

    assert booked(session, tenant) == (0, share(1), 0, job.cost)


def test_work_that_a_worker_reports_of_a_canceled_job_is_counted(session):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant)
    lease = a_lease(session, job)
    hand_on(session, lease, 0)
    store(session, job, 0)
    cancel(session, job)

    for _ in range(2):  # said twice, counted once
        leases.note_waste(
            session, lease, device_seconds=0.5, steps_done={0: NUM_STEPS, 1: 9, 2: NUM_STEPS, 3: 0}
        )

    session.flush()
    assert booked(session, tenant) == (0, share(1), work(9 + NUM_STEPS), job.cost)
    assert last_facts(session, job, "job:work:abandoned") == {
        "steps": 19,
        "abandoned": str(work(19)),
    }


def test_work_kept_in_a_snapshot_is_counted_when_its_job_is_canceled_before_it_goes_on(session):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant)
    preempt(session, a_lease(session, job), left=[a_left(0, steps_done=7), a_left(1, steps_done=2)])

    cancel(session, job)

    assert booked(session, tenant) == (0, 0, work(9), 0)


def test_work_of_a_worker_is_counted_only_for_its_own_attempt_at_a_job_taken_back(
    session,
):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant)
    zombie = a_lease(session, job, ttl_s=-1)
    leases.lose(session, job.id, max_attempts=5)
    heir = a_lease(session, job)

    leases.note_waste(session, heir, device_seconds=0.5, steps_done={0: 5})  # it goes on
    cancel(session, job)
    leases.note_waste(session, zombie, device_seconds=0.5, steps_done={0: 5})

    session.flush()
    assert booked(session, tenant) == (0, 0, 0, 0)


def test_canceling_at_the_last_step_over_and_over_uses_up_the_quota(session):
    tenant = a_tenant(session)

    for _ in range(3):
        lease = a_lease(session, a_counted_job(session, tenant))
        cancel(session, lease.job)
        leases.note_waste(
            session,
            lease,
            device_seconds=2.0,
            steps_done=dict.fromkeys(range(NUM_IMAGES), NUM_STEPS - 1),
        )
        session.flush()

    totals = usage.usage_totals(session, tenant_id=tenant.id, count_jobs_to=None)
    assert totals.used_today == totals.used_this_month == 3 * work(NUM_IMAGES * (NUM_STEPS - 1))


def test_the_work_of_a_job_that_starts_from_a_picture_is_a_part_of_the_steps_it_makes(session):
    tenant, made = a_tenant(session), 4
    job = a_counted_job(session, tenant, steps_per_image=made)
    lease = a_lease(session, job)

    cancel(session, job)
    leases.note_waste(session, lease, device_seconds=2.0, steps_done={0: 3, 1: made + 1})
    session.flush()

    counted = (JOB * (3 + made) / (NUM_IMAGES * made)).quantize(MICRO, rounding=ROUND_DOWN)
    assert booked(session, tenant) == (0, 0, counted, 0)
    assert session.execute(CHECK).all() == []
    history = text("SELECT steps_abandoned FROM job_history WHERE job_id = :id")
    assert session.scalar(history, {"id": job.id}) == 3 + made


def test_an_image_that_made_more_steps_than_were_counted_counts_those(session):
    tenant, made = a_tenant(session), 4
    job = a_counted_job(session, tenant, steps_per_image=made)
    lease = a_lease(session, job)
    hand_off(session, lease, 0, num_steps=made + 1, steps=made + 1)
    hand_off(session, lease, 1, num_steps=made, steps=made)
    store(session, job, 1)

    cancel(session, job)

    assert booked(session, tenant)[1:3] == (share(1), share(1))
    assert session.execute(CHECK).all() == []


def test_the_views_show_what_was_stored_and_what_was_abandoned(session):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant)
    lease = a_lease(session, job)
    for index in range(2):
        hand_on(session, lease, index)
    store(session, job, 0)
    cancel(session, job)

    history = session.execute(
        text("SELECT * FROM job_history WHERE job_id = :id"), {"id": job.id}
    ).one()
    day = session.execute(
        text("SELECT * FROM usage_by_tenant_day WHERE tenant = :name"), {"name": tenant.name}
    ).one()
    images = session.execute(
        text("SELECT images, cost FROM images_by_tenant_day WHERE tenant = :name"),
        {"name": tenant.name},
    ).one()

    assert (history.images_stored, history.steps_abandoned, history.cost) == (
        1,
        NUM_STEPS,
        job.cost,
    )
    assert (day.settled_megapixel_steps, day.abandoned_megapixel_steps, day.cost) == (
        share(1),
        work(NUM_STEPS),
        job.cost,
    )
    assert tuple(images) == (1, job.cost)


@given(
    amount=st.integers(0, 10**12).map(lambda micros: Decimal(micros) / 10**6),
    num_images=st.integers(1, 64),
    num_steps=st.integers(1, 1000),
    data=st.data(),
)
def test_shares_of_a_job_are_never_more_than_the_whole_and_all_of_it_is_the_whole(
    amount, num_images, num_steps, data
):
    shares = Shares(amount, num_images, num_steps)
    stored = data.draw(st.integers(0, num_images))
    steps = data.draw(st.integers(0, (num_images - stored) * num_steps))

    assert shares.of_images(num_images) == amount
    assert 0 <= shares.of_images(stored) + shares.of_steps(steps) <= amount
    assert (
        amount - shares.of_images(stored) - shares.of_steps((num_images - stored) * num_steps)
        <= 2 * MICRO
    )


class Life:
    """What may become of some jobs, one thing after the other."""

    def __init__(self, session, tenant, draw) -> None:
        self.session, self.tenant, self.draw = session, tenant, draw
        self.jobs, self.leases = [], []
        self.can = [
            self.submits,
            self.takes,
            self.takes,
            self.hands_on,
            self.hands_on,
            self.stores,
            self.stores,
        ]
        self.can += [
            self.preempts,
            self.loses,
            self.loses_pixels,
            self.errs,
            self.fails,
            self.cancels,
            self.speaks_last,
        ]

    def goes_on(self) -> None:
        with suppress(LeaseLost, jobs.JobAlreadyFinished):
            self.draw.choice(self.can)()
        self.session.flush()
        self.session.expire_all()

    def any_job(self) -> Job:
        return self.draw.choice(self.jobs) if self.jobs else self.submits()

    def any_lease(self) -> leases.Lease:
        return (
            self.draw.choice(self.leases) if self.leases else a_lease(self.session, self.submits())
        )

    def submits(self) -> Job:
        self.jobs.append(a_counted_job(self.session, self.tenant))
        return self.jobs[-1]

    def takes(self) -> None:
        lease = leases.take(
            self.session,
            self.any_job().id,
            worker=f"gpu{self.draw.random()}",
            device="cpu",
            ttl_s=-1,
        )
        self.leases += [lease] if lease is not None else []

    def hands_on(self) -> None:
        lease = self.any_lease()
        for index in self.draw.sample(
            lease.pending, min(len(lease.pending), self.draw.randint(1, 2))
        ):
            hand_on(self.session, lease, index)

    def stores(self) -> None:
        lease = self.any_lease()
        store(self.session, lease.job, self.draw.randrange(NUM_IMAGES), attempt=lease.attempt)

    def preempts(self) -> None:
        preempt(
            self.session,
            self.any_lease(),
            left=[
                a_left(self.draw.randrange(NUM_IMAGES), steps_done=self.draw.randrange(NUM_STEPS))
            ],
        )

    def loses(self) -> None:
        leases.lose(self.session, self.any_job().id, max_attempts=4)

    def loses_pixels(self) -> None:
        lease, index = self.any_lease(), self.draw.randrange(NUM_IMAGES)
        leases.lose_hand_off(self.session, lease.job_id, [index], attempt_of={index: lease.attempt})

    def errs(self) -> None:
        leases.count_error(self.session, self.any_lease(), detail="no", max_attempts=4)

    def fails(self) -> None:
        if self.draw.random() < 0.2:
            fail(self.session, self.any_lease())

    def cancels(self) -> None:
        if self.draw.random() < 0.4:
            cancel(self.session, self.any_job())

    def speaks_last(self) -> None:
        steps = {index: self.draw.randint(0, NUM_STEPS) for index in range(NUM_IMAGES)}
        leases.note_waste(self.session, self.any_lease(), device_seconds=0.1, steps_done=steps)


def what_the_rows_say(session, tenant) -> tuple[Decimal, Decimal, Decimal, Decimal]:
    """Reserved, settled, abandoned, cost: from jobs and images alone."""
    query = """SELECT j.state, j.cost, count(*) FILTER (WHERE i.state = 'stored') AS stored,
                      coalesce(sum(i.steps_done) FILTER (WHERE i.state <> 'stored'), 0) AS steps
               FROM jobs j JOIN images i ON i.job_id = j.id WHERE j.tenant_id = :id GROUP BY j.id"""
    rows = session.execute(text(query), {"id": tenant.id}).all()
    over = [row for row in rows if row.state not in ACTIVE_STATES]
    return (
        JOB * (len(rows) - len(over)),
        sum((share(row.stored) for row in over), Decimal(0)),
        sum((work(int(row.steps)) for row in over if row.state == "canceled"), Decimal(0)),
        sum((row.cost for row in over if row.cost is not None), Decimal(0)),
    )


@pytest.mark.parametrize(
    "seed", [*range(4), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(4, 12))]
)
def test_whatever_becomes_of_jobs_the_ledger_is_what_their_rows_say(session, seed):
    tenant = a_tenant(session)
    life = Life(session, tenant, random.Random(seed))
    life.submits()

    for _ in range(80):
        life.goes_on()
        assert booked(session, tenant) == what_the_rows_say(session, tenant)

    for job in life.jobs:
        if job.state in ACTIVE_STATES:
            cancel(session, job)
    assert booked(session, tenant) == what_the_rows_say(session, tenant)
    assert day_of(session, tenant).reserved == 0
    assert session.execute(CHECK).all() == []


def test_the_check_that_is_documented_finds_what_is_wrong(session):
    tenant = a_tenant(session)
    lease = a_lease(session, a_counted_job(session, tenant))
    hand_on(session, lease, 0)
    cancel(session, lease.job)
    assert session.execute(CHECK).all() == []

    session.execute(
        text("UPDATE usage_ledger SET abandoned = 0 WHERE tenant_id = :id"), {"id": tenant.id}
    )

    [wrong] = session.execute(CHECK).all()
    assert (wrong.tenant_id, wrong.abandoned, wrong.abandoned_by_rows) == (
        tenant.id,
        0,
        work(NUM_STEPS),
    )
