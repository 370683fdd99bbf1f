"""What the sweeper finds: rows whose time has come, and what nobody waits for any more."""

import uuid

from sqlalchemy import text

from models import jobs, leases, sweeping
from policy.failures import FailureCode
from tests.builders import a_job, a_lease, a_succeeded_job, hand_off, preempt, store


def test_overruns_of_jobs_that_wait_again_are_found_the_earliest_deadline_first(session):
    late, later, in_time = (a_job(session, run_within_s=seconds) for seconds in (50, 10, 600))
    for job in (late, later, in_time):
        preempt(session, a_lease(session, job))
    running = a_lease(session, run_within_s=0).job
    session.execute(
        text("UPDATE jobs SET run_by = run_by - interval '100 seconds' WHERE run_within_s < 100")
    )

    found = sweeping.overruns(session)

    assert [
        job_id for job_id in found if job_id in (late.id, later.id, in_time.id, running.id)
    ] == [later.id, late.id]


def seconds_until(session, column: str, job) -> float:
    return float(
        session.scalar(
            text(
                f"SELECT extract(epoch FROM {column} - clock_timestamp()) FROM jobs WHERE id = :id"
            ),
            {"id": job.id},
        )
    )


def test_an_outage_leaves_who_waits_as_long_again_as_it_lasted_and_nobody_less_than_he_had(session):
    overdue, near, far = (a_job(session, start_within_s=seconds) for seconds in (-20, 2, 100))
    again = a_lease(session, run_within_s=3).job
    preempt(session, a_lease_of(session, again))
    running = a_lease(session, run_within_s=3).job

    assert sweeping.prolong_deadlines(session, lasted_s=10) >= 2

    left = {job.id: seconds_until(session, "start_by", job) for job in (overdue, near, far)}
    assert left[overdue.id] < -19
    assert 5 < left[near.id] <= 10
    assert 90 < left[far.id] <= 100
    assert 5 < seconds_until(session, "run_by", again) <= 10
    assert seconds_until(session, "run_by", running) <= 3


def a_lease_of(session, job) -> leases.Lease:
    """The lease under which the job runs."""
    return leases.Lease(job=job, attempt=job.attempt, worker=job.worker, pending=(0,))


def test_tries_to_have_a_job_stored_come_further_and_further_apart_up_to_a_limit(session):
    lease = a_lease(session)
    job = hand_off(session, lease)

    for rendered_ago_s, next_in_s in ((0, 10), (25, 25), (1000, 60)):
        session.execute(
            text(
                "UPDATE jobs SET rendered_at = clock_timestamp() - make_interval(secs => :ago) "
                "WHERE id = :id"
            ),
            {"ago": rendered_ago_s, "id": job.id},
        )
        sweeping.postpone_store(session, job.id, store_within_s=10)
        session.flush()
        assert next_in_s - 1 < seconds_until(session, "store_by", job) <= next_in_s + 1


def test_when_storing_works_again_every_storing_job_is_due(session):
    job = hand_off(session, a_lease(session), store_within_s=60)
    assert job.id not in [unstored.job_id for unstored in sweeping.overdue_stores(session)]

    sweeping.hasten_stores(session)

    assert job.id in [unstored.job_id for unstored in sweeping.overdue_stores(session)]
    assert sweeping.storing_by_tier(session)["fast"] >= 1


def test_pixels_are_awaited_from_the_moment_a_worker_has_the_job_until_they_are_stored(session):
    lease = a_lease(session, num_images=2)
    job_id = lease.job_id

    def awaited():
        return sweeping.awaited_pixels(session, [job_id])

    assert awaited() == {(job_id, 0, 1), (job_id, 1, 1)}, (
        "the worker may put them away at any moment"
    )
    for index in (0, 1):
        hand_off(session, lease, index)
    assert awaited() == {(job_id, 0, 1), (job_id, 1, 1)}
    store(session, lease.job, 0)
    assert awaited() >= {(job_id, 1, 1)}
    store(session, lease.job, 1)
    assert awaited() == set()


def test_pixels_of_an_attempt_that_was_lost_before_it_handed_them_off_are_awaited_by_nobody(
    session,
):
    lease = a_lease(session, num_images=2, ttl_s=-1)
    hand_off(session, lease, 0)
    leases.lose(session, lease.job_id, max_attempts=5)
    a_lease(session, lease.job)

    awaited = sweeping.awaited_pixels(session, [lease.job_id])

    assert {(lease.job_id, 0, 1), (lease.job_id, 1, 2)} <= awaited
    assert (lease.job_id, 1, 1) not in awaited


def test_pixels_of_a_job_nobody_knows_are_awaited_by_nobody(session):
    assert sweeping.awaited_pixels(session, [uuid.uuid4()]) == set()
    assert sweeping.awaited_pixels(session, []) == set()


def test_snapshots_of_a_job_that_is_over_or_unknown_are_of_no_use_and_those_of_any_other_are(
    session,
):
    queued, running, storing = a_job(session), a_lease(session).job, a_lease(session)
    hand_off(session, storing)
    succeeded, canceled = a_succeeded_job(session), a_job(session)
    jobs.cancel(session, canceled.id, tenant_id=canceled.tenant_id, actor="tests")
    failed = leases.fail(session, a_lease(session), code=FailureCode.INTERNAL, detail="x")
    over = {succeeded.id, canceled.id, failed.id, uuid.uuid4()}

    assert sweeping.finished_of(session, [queued.id, running.id, storing.job_id, *over]) == over
    assert sweeping.finished_of(session, []) == set()
