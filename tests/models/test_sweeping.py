"""What the sweeper finds: rows whose time has come, and what nobody waits for any more."""

import uuid

from sqlalchemy import text

from models import jobs, leases, sweeping
from models.states import FailureCode
from tests.builders import a_job, a_lease, a_succeeded_job, hand_off, preempt, store


def test_who_waits_again_past_the_run_deadline_is_found_the_earliest_deadline_first(session):
    late, later, in_time = (a_job(session, run_within_s=seconds) for seconds in (50, 10, 600))
    for job in (late, later, in_time):
        preempt(session, a_lease(session, job))
    running = a_lease(session, run_within_s=0).job
    session.execute(text("UPDATE jobs SET run_by = run_by - interval '100 seconds' WHERE run_within_s < 100"))

    found = sweeping.overruns(session)

    assert [job_id for job_id in found if job_id in (late.id, later.id, in_time.id, running.id)] == [later.id, late.id]


def test_pixels_are_awaited_from_the_moment_a_worker_has_the_job_until_they_are_stored(session):
    lease = a_lease(session, num_images=2)
    job_id = lease.job_id

    def awaited():
        return sweeping.awaited_pixels(session, [job_id])

    assert awaited() == {(job_id, 0, 1), (job_id, 1, 1)}, "the worker may put them away at any moment"
    for index in (0, 1):
        hand_off(session, lease, index)
    assert awaited() == {(job_id, 0, 1), (job_id, 1, 1)}
    store(session, lease.job, 0)
    assert awaited() >= {(job_id, 1, 1)}
    store(session, lease.job, 1)
    assert awaited() == set()


def test_pixels_of_an_attempt_that_was_lost_before_it_handed_them_off_are_awaited_by_nobody(session):
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


def test_snapshots_of_a_job_that_is_over_or_unknown_are_of_no_use_and_those_of_any_other_are(session):
    queued, running, storing = a_job(session), a_lease(session).job, a_lease(session)
    hand_off(session, storing)
    succeeded, canceled = a_succeeded_job(session), a_job(session)
    jobs.cancel(session, canceled.id, tenant_id=canceled.tenant_id, actor="tests")
    failed = leases.fail(session, a_lease(session), code=FailureCode.INTERNAL, detail="x")
    over = {succeeded.id, canceled.id, failed.id, uuid.uuid4()}

    assert sweeping.finished_of(session, [queued.id, running.id, storing.job_id, *over]) == over
    assert sweeping.finished_of(session, []) == set()
