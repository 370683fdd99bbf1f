"""The ledger: reserved when a job is accepted, settled when it succeeds, released when it comes to
nothing; sums of days and months.
"""

from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal

import pytest
from sqlalchemy import text

from models import accepting, jobs, leases, usage
from models.accepting import NewJob
from models.tables import UsageDay
from policy.failures import FailureCode
from tests.builders import (
    a_job,
    a_lease,
    a_succeeded_job,
    a_tenant,
    a_zone_of_another_day,
    hand_off,
    resolved,
    store,
)

A_JOB, NOTHING = Decimal("1.5"), Decimal(0)  # megapixel-steps


def a_counted_job(session, tenant, amount=A_JOB, **params):
    """An accepted job that counts `amount` megapixel-steps against its tenant's quotas."""
    own = {"tenant_id": tenant.id, "api_key_id": None, "currency": "EUR", "actor": "tests"}
    new_job = NewJob(
        params=replace(resolved(), **params), start_within_s=600, megapixel_steps=amount
    )
    return jobs.accept(session, new_job, **own)


def a_day(session, tenant, day, *, reserved=NOTHING, settled=NOTHING, abandoned=NOTHING):
    session.add(
        UsageDay(
            tenant_id=tenant.id, day=day, reserved=reserved, settled=settled, abandoned=abandoned
        )
    )
    session.flush()


def today_of(session) -> date:
    """By the database's clock."""
    return session.scalar(text("SELECT (clock_timestamp() AT TIME ZONE 'UTC')::date"))


def ledger_of(session, tenant) -> list[UsageDay]:
    """Every day of the tenant, as the database has it."""
    session.expire_all()
    return list(
        usage.days(session, tenant_id=tenant.id, since=date(2000, 1, 1), until=date(2100, 1, 1))
    )


def stand_of(session, tenant, count_jobs_to=None):
    return usage.usage_totals(session, tenant_id=tenant.id, count_jobs_to=count_jobs_to)


def facts(day) -> tuple:
    return day.reserved, day.settled, day.jobs_accepted, day.jobs_succeeded


def test_accepting_a_job_reserves_what_it_counts(session):
    tenant = a_tenant(session)

    job = a_counted_job(session, tenant)

    [day] = ledger_of(session, tenant)
    assert (day.day, job.usage_day) == (today_of(session), day.day)
    assert facts(day) == (A_JOB, NOTHING, 1, 0)
    assert day.cost == 0


def test_jobs_accepted_together_are_reserved_together(session):
    tenant = a_tenant(session)
    together = [
        NewJob(params=resolved(), start_within_s=600, megapixel_steps=amount)
        for amount in (A_JOB, Decimal("0.25"))
    ]

    accepting.accept(
        session, together, tenant_id=tenant.id, api_key_id=None, currency="EUR", actor="tests"
    )

    assert [facts(day) for day in ledger_of(session, tenant)] == [(Decimal("1.75"), NOTHING, 2, 0)]


def test_a_job_that_succeeds_is_settled_with_its_price(session):
    tenant = a_tenant(session)
    job, waiting = a_counted_job(session, tenant), Decimal("0.000001")
    a_counted_job(session, tenant, waiting)

    lease = a_lease(session, job)
    hand_off(session, lease)
    ended = store(session, job)

    assert ended.state == "succeeded"
    [day] = ledger_of(session, tenant)
    assert facts(day) == (waiting, A_JOB, 2, 1)
    assert day.cost == ended.cost > 0


def test_the_cost_of_a_day_is_the_sum_of_its_jobs_whatever_became_of_them(session):
    tenant = a_tenant(session)
    one, two = a_counted_job(session, tenant), a_counted_job(session, tenant)
    partly = a_counted_job(session, tenant, num_images=2)

    for job, device_seconds in ((one, 0.5), (two, 1.25)):
        hand_off(session, a_lease(session, job), device_seconds=device_seconds)
        store(session, job)
    hand_off(session, a_lease(session, partly), 0, device_seconds=2.0)
    store(session, partly, 0)
    is_taken_back(session, partly)

    [day] = ledger_of(session, tenant)
    costs = [job.cost for job in (one, two, partly)]
    assert len(set(costs)) == 3
    assert (day.cost, day.jobs_succeeded) == (sum(costs), 2)
    assert sum(costs) == Decimal("0.000333") + Decimal("0.000833") + Decimal("0.001333")


def test_a_job_is_settled_once_and_only_with_its_last_image(session):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant, num_images=2)
    lease = a_lease(session, job)
    hand_off(session, lease, 0)
    hand_off(session, lease, 1)

    store(session, job, 0)
    assert [facts(day) for day in ledger_of(session, tenant)] == [(A_JOB, NOTHING, 1, 0)]
    store(session, job, 1)
    store(session, job, 1)

    assert [facts(day) for day in ledger_of(session, tenant)] == [(NOTHING, A_JOB, 1, 1)]


def is_taken_back(session, job):
    jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")


def is_taken_back_while_it_runs(session, job):
    a_lease(session, job)
    is_taken_back(session, job)


def fails(session, job):
    leases.fail(session, a_lease(session, job), code=FailureCode.NOT_FINITE, detail="NaN")


def is_tried_too_often(session, job):
    leases.count_error(session, a_lease(session, job), detail="no", max_attempts=1)


def expires(session, job):
    session.execute(
        text("UPDATE jobs SET start_by = clock_timestamp() - interval '1 s' WHERE id = :id"),
        {"id": job.id},
    )
    assert jobs.expire(session, job.id) is not None


@pytest.mark.parametrize(
    "ends", [is_taken_back, is_taken_back_while_it_runs, fails, is_tried_too_often, expires]
)
def test_a_reservation_for_a_job_that_comes_to_nothing_is_free_again(session, ends):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant)

    ends(session, job)

    [day] = ledger_of(session, tenant)
    assert facts(day) == (NOTHING, NOTHING, 1, 0)
    assert day.cost == 0


def test_a_job_that_is_tried_again_stays_reserved(session):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant)

    leases.count_error(session, a_lease(session, job), detail="no", max_attempts=5)

    assert [facts(day) for day in ledger_of(session, tenant)] == [(A_JOB, NOTHING, 1, 0)]


def test_a_job_is_booked_on_the_day_on_which_it_was_accepted(session):
    tenant = a_tenant(session)
    job = a_counted_job(session, tenant)
    yesterday = job.usage_day - timedelta(days=1)
    for statement in (
        "UPDATE usage_ledger SET day = :day WHERE tenant_id = :tenant_id",
        "UPDATE jobs SET usage_day = :day WHERE id = :id",
    ):
        session.execute(text(statement), {"day": yesterday, "tenant_id": tenant.id, "id": job.id})
    session.expire_all()

    lease = a_lease(session, job)
    hand_off(session, lease)
    store(session, job)

    assert [(day.day, *facts(day)) for day in ledger_of(session, tenant)] == [
        (yesterday, NOTHING, A_JOB, 1, 1)
    ]


def test_a_job_of_before_there_was_a_ledger_is_settled_nowhere(session):
    tenant = a_tenant(session)

    booking = usage.Booking(
        reserved=A_JOB, settled=A_JOB, abandoned=NOTHING, cost=Decimal(1), succeeded=True
    )

    usage.settle(session, booking, tenant_id=tenant.id, day=None)
    usage.abandon(session, A_JOB, tenant_id=tenant.id, day=None)

    assert ledger_of(session, tenant) == []


def test_the_stand_is_what_is_reserved_settled_and_abandoned_today_and_this_month(session):
    tenant, today = a_tenant(session), today_of(session)
    this_month, last_month = (
        today.replace(day=2 if today.day == 1 else 1),
        today.replace(day=1) - timedelta(days=1),
    )
    a_day(
        session,
        tenant,
        today,
        reserved=Decimal("0.5"),
        settled=Decimal("0.25"),
        abandoned=Decimal("0.125"),
    )
    a_day(session, tenant, this_month, settled=Decimal(10), reserved=Decimal(1))
    a_day(session, tenant, last_month, settled=Decimal(100))
    a_day(session, a_tenant(session), today, settled=Decimal(1000))

    stand = stand_of(session, tenant)

    assert (stand.used_today, stand.used_this_month) == (Decimal("0.875"), Decimal("11.875"))


def test_the_stand_follows_the_jobs_of_the_same_transaction(session):
    tenant = a_tenant(session)
    assert (stand_of(session, tenant).used_today, stand_of(session, tenant).used_this_month) == (
        0,
        0,
    )

    first, _ = a_counted_job(session, tenant), a_counted_job(session, tenant)
    both = stand_of(session, tenant)
    fails(session, first)
    one = stand_of(session, tenant)

    assert (both.used_today, both.used_this_month) == (2 * A_JOB, 2 * A_JOB)
    assert (one.used_today, one.used_this_month) == (A_JOB, A_JOB)


def test_the_stand_tells_how_long_the_day_and_the_month_still_are(session):
    now = datetime.now(UTC)
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    first = (midnight.replace(day=28) + timedelta(days=4)).replace(day=1)

    stand = stand_of(session, a_tenant(session))

    assert stand.day_ends_in_s == pytest.approx(
        (midnight + timedelta(days=1) - now).total_seconds(), abs=30
    )
    assert stand.month_ends_in_s == pytest.approx((first - now).total_seconds(), abs=30)


def test_the_ledger_goes_by_utc_days_in_a_session_of_another_zone(session):
    """Where it is another day: the first or the last of a month is another month there, too."""
    session.execute(text(f"SET LOCAL TIME ZONE '{a_zone_of_another_day()}'"))
    tenant, today = a_tenant(session), datetime.now(UTC).date()
    midnight = datetime.combine(today, datetime.min.time(), UTC)
    for days in (-1, 1):
        a_day(session, tenant, today + timedelta(days=days), settled=Decimal(100))

    job = a_counted_job(session, tenant)
    hand_off(session, a_lease(session, job))
    store(session, job)

    stand = stand_of(session, tenant)
    left_s = (midnight + timedelta(days=1) - datetime.now(UTC)).total_seconds()
    assert session.scalar(text("SELECT clock_timestamp()::date")) != today
    assert (job.usage_day, stand.used_today) == (today, A_JOB)
    assert stand.day_ends_in_s == pytest.approx(left_s, abs=30)
    booked = [facts(day) for day in ledger_of(session, tenant) if day.day == today]
    assert booked == [(NOTHING, A_JOB, 1, 1)]


def test_jobs_under_way_are_counted_as_far_as_is_asked(session):
    tenant = a_tenant(session)
    queued, running, storing, over = (a_job(session, tenant=tenant) for _ in range(4))
    a_lease(session, running)
    hand_off(session, a_lease(session, storing))
    is_taken_back(session, over)
    a_succeeded_job(session, tenant=tenant)
    a_job(session)  # another tenant's

    counts = {
        count_jobs_to: stand_of(session, tenant, count_jobs_to).active_jobs
        for count_jobs_to in (None, 0, 1, 2, 3, 1_000_000)
    }

    assert (queued.state, running.state, storing.state, over.state) == (
        "queued",
        "running",
        "storing",
        "canceled",
    )
    # one more than asked: enough to know that it is over
    assert counts == {None: 0, 0: 1, 1: 2, 2: 3, 3: 3, 1_000_000: 3}


def test_days_are_told_from_the_first_to_the_last_both_included_and_oldest_first(session):
    tenant, other = a_tenant(session), a_tenant(session)
    for number in (5, 1, 3, 4, 2):
        a_day(session, tenant, date(2026, 3, number), settled=Decimal(number))
    a_day(session, other, date(2026, 3, 3), settled=Decimal(1000))

    days = usage.days(session, tenant_id=tenant.id, since=date(2026, 3, 2), until=date(2026, 3, 4))

    assert [(day.day, day.settled) for day in days] == [
        (date(2026, 3, number), Decimal(number)) for number in (2, 3, 4)
    ]
