"""Leases: one worker at a time, fenced by the attempt; what counts as a try and what does not."""

import uuid

import pytest
from sqlalchemy import text

from models import jobs, leases, sweeping
from models.database import transaction
from models.leases import LeaseLost
from models.states import FailureCode
from tests.builders import a_job, a_lease, a_succeeded_job, hand_off, store
from tests.models.facts import at_once, attempt_of, events_of


def lease_seconds(session, job) -> float:
    """How long the job's lease still lasts, by the database's clock."""
    return float(
        session.scalar(text("SELECT extract(epoch FROM lease_expires_at - clock_timestamp()) FROM jobs WHERE id = :id"), {"id": job.id})
    )


def take(session, job, worker="gpu1@there", ttl_s=15.0):
    return leases.take(session, job.id, worker=worker, device="cpu", ttl_s=ttl_s)


def lose(session, job, max_attempts=5):
    return leases.lose(session, job.id, max_attempts=max_attempts)


def test_a_queued_job_is_given_to_the_worker_that_asks(session):
    job = a_job(session, num_images=3)

    lease = take(session, job, worker="gpu0@here", ttl_s=15)

    assert (lease.attempt, lease.pending, lease.worker) == (1, (0, 1, 2), "gpu0@here")
    assert (job.state, job.worker, job.attempt) == ("running", "gpu0@here", 1)
    assert 14 < lease_seconds(session, job) <= 15
    assert attempt_of(session, job.id).outcome == "running"
    assert events_of(session, job.id) == ["job:request:accepted", "job:lease:taken"]


def test_of_racing_workers_one_wins(database):
    with transaction(database.app) as session:
        job = a_job(session)

    def take_it(worker):
        with transaction(database.app) as session:
            return take(session, job, worker=worker)

    leased = at_once(*[lambda worker=f"gpu{number}@here": take_it(worker) for number in range(8)])

    [winner] = [lease for lease in leased if lease]
    with transaction(database.app) as session:
        assert session.scalar(text("SELECT worker FROM jobs WHERE id = :id"), {"id": job.id}) == winner.worker
        assert events_of(session, job.id) == ["job:request:accepted", "job:lease:taken"]


def test_a_job_in_other_hands_is_not_given_twice_not_even_when_its_lease_ran_out(session):
    lease = a_lease(session, ttl_s=-1)

    assert take(session, lease.job) is None


def test_a_finished_or_unknown_job_is_not_given(session):
    job = a_succeeded_job(session)

    assert take(session, job) is None
    assert leases.take(session, uuid.uuid4(), worker="gpu0@here", device="cpu", ttl_s=15) is None


def test_a_job_is_not_started_after_its_deadline(session):
    assert take(session, a_job(session, start_within_s=-1)) is None


def test_a_job_that_was_started_in_time_is_taken_again_after_it(session):
    job = a_job(session, start_within_s=600)
    leases.give_back(session, a_lease(session, job), reason="drain")
    session.execute(text("UPDATE jobs SET start_by = clock_timestamp() - interval '1 second' WHERE id = :id"), {"id": job.id})

    assert take(session, job).attempt == 2


def test_renewing_prolongs_one_s_own_leases_and_tells_which_they_are(session):
    mine, lost, canceled = a_lease(session, ttl_s=1), a_lease(session, ttl_s=-1), a_lease(session)
    lose(session, lost.job)
    take(session, lost.job)
    jobs.cancel(session, canceled.job_id, tenant_id=canceled.job.tenant_id, actor="tests")
    held = [(lease.job_id, lease.attempt) for lease in (mine, lost, canceled)]

    kept = leases.renew(session, held, ttl_s=60)

    assert kept == {mine.job_id}
    assert lease_seconds(session, mine.job) > 50
    assert lease_seconds(session, lost.job) < 20


def test_renewing_nothing_asks_nothing(session):
    assert leases.renew(session, [], ttl_s=15) == set()


def test_an_expired_lease_is_offered_to_the_next_worker(session):
    first = a_lease(session, ttl_s=-1)
    assert first.job_id in sweeping.expired_leases(session)

    job = lose(session, first.job)

    assert (job.state, job.counted_attempts, job.worker, job.announced_at) == ("queued", 1, None, None)
    assert attempt_of(session, job.id).outcome == "lease_lost"
    assert take(session, job).attempt == 2


def test_a_lease_that_was_renewed_meanwhile_is_not_lost(session):
    lease = a_lease(session, ttl_s=-1)
    leases.renew(session, [(lease.job_id, lease.attempt)], ttl_s=15)

    assert lose(session, lease.job) is None
    assert lease.job.state == "running"


def test_after_the_last_allowed_loss_the_job_fails(session):
    job = a_job(session)
    for _ in range(3):
        a_lease(session, job, ttl_s=-1)
        lose(session, job, max_attempts=3)

    assert (job.state, job.failure_code, job.attempt) == ("failed", FailureCode.ATTEMPTS_EXHAUSTED, 3)
    assert events_of(session, job.id)[-1] == "job:state:failed"
    assert take(session, job) is None


def test_an_error_counts_like_a_loss(session):
    job = a_job(session)
    leases.count_error(session, a_lease(session, job), detail="cuDNN said no", max_attempts=2)
    assert (job.state, job.counted_attempts) == ("queued", 1)

    leases.count_error(session, a_lease(session, job), detail="cuDNN said no", max_attempts=2)

    assert (job.state, job.failure_code, job.failure_detail) == ("failed", "attempts_exhausted", "cuDNN said no")
    assert (attempt_of(session, job.id, 2).outcome, attempt_of(session, job.id, 2).waste_class) == ("error", "error")


def test_giving_back_does_not_count_and_keeps_the_job_s_place(session):
    job = a_job(session, release_tag=12.5)

    for _ in range(7):
        leases.give_back(session, a_lease(session, job), reason="drain")

    assert (job.state, job.attempt, job.counted_attempts, job.release_tag) == ("queued", 7, 0, 12.5)
    assert attempt_of(session, job.id).outcome == "returned"


def test_a_failure_that_no_retry_helps_ends_the_job_at_once(session):
    lease = a_lease(session)

    job = leases.fail(session, lease, code=FailureCode.UNSUPPORTED, detail="no such sampler")

    assert (job.state, job.failure_code, job.failure_detail, job.lease_expires_at) == ("failed", "unsupported", "no such sampler", None)


def test_the_last_image_handed_off_makes_the_job_storing_and_ends_the_lease(session):
    lease = a_lease(session, num_images=2)

    first = hand_off(session, lease, 0)
    assert (first.state, first.lease_expires_at is None) == ("running", False)
    second = hand_off(session, lease, 1)

    assert (second.state, second.lease_expires_at, second.store_by is None) == ("storing", None, False)
    assert jobs.handed_off(session, lease.job_id) == {0: 1, 1: 1}
    assert attempt_of(session, lease.job_id).outcome == "rendered"
    assert events_of(session, lease.job_id)[-2:] == ["job:image:handed-off"] * 2


def test_the_attempt_s_record_adds_up_its_images(session):
    lease = a_lease(session, num_images=2)

    hand_off(session, lease, 0, steps=4, shared_steps=4, max_rows=6, max_images=3, mean_rows=6.0, device_seconds=0.25)
    hand_off(session, lease, 1, steps=12, shared_steps=0, max_rows=2, max_images=1, mean_rows=2.0, device_seconds=0.5)

    record = attempt_of(session, lease.job_id)
    assert (record.steps, record.shared_steps, record.max_rows, record.max_images) == (16, 4, 6, 3)
    assert (record.mean_rows, record.device_seconds) == (3.0, 0.75)


def late_writes():
    """Everything that a worker may still try under a lease that it lost."""
    return [
        pytest.param(lambda session, lease: hand_off(session, lease), id="hand_off"),
        pytest.param(lambda session, lease: leases.give_back(session, lease, reason="drain"), id="give_back"),
        pytest.param(lambda session, lease: leases.fail(session, lease, code=FailureCode.INTERNAL, detail="x"), id="fail"),
        pytest.param(lambda session, lease: leases.count_error(session, lease, detail="x", max_attempts=5), id="count_error"),
    ]


@pytest.mark.parametrize("write", late_writes())
def test_a_late_write_of_an_older_attempt_is_refused(session, write):
    old = a_lease(session, ttl_s=-1)
    lose(session, old.job)
    new = a_lease(session, old.job)
    before = events_of(session, old.job_id)

    with pytest.raises(LeaseLost):
        write(session, old)

    assert events_of(session, old.job_id) == before
    assert (new.job.state, new.job.attempt) == ("running", 2)
    assert hand_off(session, new).state == "storing"


@pytest.mark.parametrize("write", late_writes())
def test_a_write_after_the_cancel_is_refused(session, write):
    lease = a_lease(session)
    jobs.cancel(session, lease.job_id, tenant_id=lease.job.tenant_id, actor="tests")

    with pytest.raises(LeaseLost):
        write(session, lease)

    assert lease.job.state == "canceled"


def test_a_new_attempt_renders_only_what_is_neither_stored_nor_waiting_in_the_hand_off(session):
    lease = a_lease(session, num_images=3, ttl_s=-1)
    hand_off(session, lease, 0)
    hand_off(session, lease, 1)
    store(session, lease.job, 0)
    lose(session, lease.job)

    again = a_lease(session, lease.job)

    assert again.pending == (2,)


def test_what_was_handed_off_before_the_lease_was_lost_is_stored_while_the_job_waits_again(session):
    lease = a_lease(session, num_images=2, ttl_s=-1)
    hand_off(session, lease, 0)
    job = lose(session, lease.job)

    assert store(session, job, 0, attempt=1) is job

    assert job.state == "queued"
    assert jobs.handed_off(session, job.id) == {}
    hand_off(session, a_lease(session, job), 1)
    assert store(session, job, 1, attempt=2).state == "succeeded"


def test_a_vanished_hand_off_sends_back_only_what_is_gone(session):
    lease = a_lease(session, num_images=3)
    for index in range(3):
        hand_off(session, lease, index)
    store(session, lease.job, 0)

    job = leases.lose_hand_off(session, lease.job_id, [1], attempt_of={1: 1, 2: 1})

    assert (job.state, job.counted_attempts) == ("queued", 0)
    assert a_lease(session, job).pending == (1,)
    assert jobs.handed_off(session, job.id) == {2: 1}


def test_a_hand_off_that_vanished_while_the_job_waits_is_rendered_with_the_rest(session):
    lease = a_lease(session, num_images=2, ttl_s=-1)
    hand_off(session, lease, 0)
    job = lose(session, lease.job)

    leases.lose_hand_off(session, job.id, [0], attempt_of={0: 1})

    assert job.state == "queued"
    assert a_lease(session, job).pending == (0, 1)


def test_a_hand_off_that_vanished_while_the_job_runs_leaves_the_job_to_its_worker(session):
    lease = a_lease(session, num_images=2)
    hand_off(session, lease, 0)

    leases.lose_hand_off(session, lease.job_id, [0], attempt_of={0: 1})
    hand_off(session, lease, 1)

    assert lease.job.state == "running"  # image 0 is to be rendered again: the worker gives the job back
    leases.give_back(session, lease, reason="an image is to be rendered again")
    assert a_lease(session, lease.job).pending == (0,)


def test_pixels_of_a_newer_attempt_are_not_taken_for_the_lost_ones(session):
    lease = a_lease(session)
    hand_off(session, lease)
    leases.lose_hand_off(session, lease.job_id, [0], attempt_of={0: 1})
    hand_off(session, a_lease(session, lease.job))

    assert leases.lose_hand_off(session, lease.job_id, [0], attempt_of={0: 1}) is None

    assert lease.job.state == "storing"


def test_wasted_device_time_goes_on_the_attempt_s_account(session):
    lease = a_lease(session)

    leases.note_waste(session, lease.job_id, 1, device_seconds=1.5)
    leases.count_error(session, lease, detail="x", max_attempts=5)

    record = attempt_of(session, lease.job_id)
    assert (record.device_seconds, record.waste_class) == (1.5, "error")
    assert lease.job.device_seconds == 0
