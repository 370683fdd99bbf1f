"""Leases: one worker at a time, fenced by the attempt; what counts as a try and what does not."""

import uuid
from dataclasses import replace

import pytest
from sqlalchemy import select, text

from models import jobs, leases, sweeping
from models.database import transaction
from models.leases import LeaseLost
from models.tables import Image
from policy.failures import FailureCode, is_our_fault
from tests.builders import a_job, a_lease, a_left, a_succeeded_job, hand_off, preempt, store
from tests.models.facts import at_once, attempt_of, events_of


def lease_seconds(session, job) -> float:
    """How long the job's lease still lasts, by the database's clock."""
    return float(
        session.scalar(
            text(
                "SELECT extract(epoch FROM lease_expires_at - clock_timestamp()) FROM jobs "
                "WHERE id = :id"
            ),
            {"id": job.id},
        )
    )


def take(session, job, worker="gpu1@there", ttl_s=15.0):
    return leases.take(session, job.id, worker=worker, device="cpu", ttl_s=ttl_s)


def lose(session, job, max_attempts=5):
    return leases.lose(session, job.id, max_attempts=max_attempts)


def note_resumption(session, lease, resumed, lost_steps=0):
    """As the worker does at its start; what follows comes in other transactions."""
    cause = leases.note_resumption(session, lease, resumed=resumed, lost_steps=lost_steps)
    session.flush()
    session.expire_all()
    return cause


def image_of(session, job, index=0) -> Image:
    return session.get_one(Image, (job.id, index))


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
        assert (
            session.scalar(text("SELECT worker FROM jobs WHERE id = :id"), {"id": job.id})
            == winner.worker
        )
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
    session.execute(
        text("UPDATE jobs SET start_by = clock_timestamp() - interval '1 second' WHERE id = :id"),
        {"id": job.id},
    )

    assert take(session, job).attempt == 2


def test_renewing_prolongs_one_s_own_leases_and_tells_which_they_are(session):
    mine, lost, canceled = a_lease(session, ttl_s=1), a_lease(session, ttl_s=-1), a_lease(session)
    lose(session, lost.job)
    take(session, lost.job)
    jobs.cancel(session, canceled.job_id, tenant_id=canceled.job.tenant_id, actor="tests")
    held = [(lease.job_id, lease.attempt) for lease in (mine, lost, canceled)]

    kept = leases.renew(session, held, worker=mine.worker, ttl_s=60)

    assert kept == {mine.job_id}
    assert lease_seconds(session, mine.job) > 50
    assert lease_seconds(session, lost.job) < 20


def test_renewing_nothing_asks_nothing(session):
    assert leases.renew(session, [], worker="gpu0@here", ttl_s=15) == set()


def test_two_workers_that_were_given_the_same_attempt_are_kept_apart_by_their_names(session):
    """As after a failover to a standby that had not got the last commits."""
    mine = a_lease(session, worker="gpu0@here")
    theirs = replace(mine, worker="gpu1@there")
    held = [(mine.job_id, mine.attempt)]

    assert leases.renew(session, held, worker=theirs.worker, ttl_s=60) == set()
    with pytest.raises(LeaseLost):
        hand_off(session, theirs)
    with pytest.raises(LeaseLost):
        leases.count_error(session, theirs, detail="no", max_attempts=5)

    assert leases.renew(session, held, worker=mine.worker, ttl_s=60) == {mine.job_id}
    assert hand_off(session, mine).state == "storing"


def test_how_far_images_have_come_is_noted_and_told_to_the_next_attempt(session):
    lease = a_lease(session, num_images=3, num_steps=20, ttl_s=-1)
    hand_off(session, lease, 0, num_steps=20)

    # the second was heard late: nothing goes back
    for steps in ({0: 20, 1: 7, 2: 3}, {1: 6, 2: 9}):
        leases.note_steps(session, {(lease.job_id, index): step for index, step in steps.items()})
    leases.note_steps(session, {})

    again = a_lease(session, lose(session, lease.job))
    assert again.reached == {1: 7, 2: 9}
    note_resumption(session, again, {1: 5, 2: 0}, lost_steps=11)
    assert a_lease(session, lose_now(session, again)).reached == {1: 5}


def test_an_image_whose_pixels_vanished_had_come_to_its_end(session):
    lease = a_lease(session, num_steps=20)
    hand_off(session, lease, num_steps=20)

    job = leases.lose_hand_off(session, lease.job_id, [0], attempt_of={0: 1})

    assert a_lease(session, job).reached == {0: 20}
    assert image_of(session, job).steps_done == 0, "nothing is left of it"


def lose_now(session, lease):
    """Let the lease run out and be found."""
    query = "UPDATE jobs SET lease_expires_at = clock_timestamp() - interval '1 s' WHERE id = :id"
    session.execute(text(query), {"id": lease.job_id})
    return lose(session, lease.job)


def test_an_expired_lease_is_offered_to_the_next_worker(session):
    first = a_lease(session, ttl_s=-1)
    assert first.job_id in sweeping.expired_leases(session)

    job = lose(session, first.job)

    assert (job.state, job.counted_attempts, job.worker, job.announced_at) == (
        "queued",
        1,
        None,
        None,
    )
    assert attempt_of(session, job.id).outcome == "lease_lost"
    assert take(session, job).attempt == 2


def test_a_lease_that_was_renewed_meanwhile_is_not_lost(session):
    lease = a_lease(session, ttl_s=-1)
    leases.renew(session, [(lease.job_id, lease.attempt)], worker=lease.worker, ttl_s=15)

    assert lose(session, lease.job) is None
    assert lease.job.state == "running"


def test_after_the_last_allowed_loss_the_job_fails(session):
    job = a_job(session)
    for _ in range(3):
        a_lease(session, job, ttl_s=-1)
        lose(session, job, max_attempts=3)

    assert (job.state, job.failure_code, job.attempt) == (
        "failed",
        FailureCode.ATTEMPTS_EXHAUSTED,
        3,
    )
    assert events_of(session, job.id)[-1] == "job:state:failed"
    assert take(session, job) is None


def test_an_error_counts_like_a_loss(session):
    job = a_job(session)
    leases.count_error(session, a_lease(session, job), detail="cuDNN said no", max_attempts=2)
    assert (job.state, job.counted_attempts) == ("queued", 1)

    leases.count_error(session, a_lease(session, job), detail="cuDNN said no", max_attempts=2)

    assert (job.state, job.failure_code, job.failure_detail) == (
        "failed",
        "attempts_exhausted",
        "cuDNN said no",
    )
    assert (attempt_of(session, job.id, 2).outcome, attempt_of(session, job.id, 2).waste_class) == (
        "error",
        "error",
    )


def test_giving_back_does_not_count_and_keeps_the_job_s_place(session):
    job = a_job(session, release_tag=12.5)

    for _ in range(7):
        leases.give_back(session, a_lease(session, job), reason="drain")

    assert (job.state, job.attempt, job.counted_attempts, job.release_tag) == ("queued", 7, 0, 12.5)
    assert attempt_of(session, job.id).outcome == "returned"


def test_a_failure_that_no_retry_helps_ends_the_job_at_once(session):
    lease = a_lease(session)

    job = leases.fail(session, lease, code=FailureCode.UNSUPPORTED, detail="no such sampler")

    assert (job.state, job.failure_code, job.failure_detail, job.lease_expires_at) == (
        "failed",
        "unsupported",
        "no such sampler",
        None,
    )


def test_the_last_image_handed_off_makes_the_job_storing_and_ends_the_lease(session):
    lease = a_lease(session, num_images=2)

    first = hand_off(session, lease, 0)
    assert (first.state, first.lease_expires_at is None) == ("running", False)
    second = hand_off(session, lease, 1)

    assert (second.state, second.lease_expires_at, second.store_by is None) == (
        "storing",
        None,
        False,
    )
    assert jobs.handed_off(session, lease.job_id) == {0: 1, 1: 1}
    assert attempt_of(session, lease.job_id).outcome == "rendered"
    assert events_of(session, lease.job_id)[-2:] == ["job:image:handed-off"] * 2


def test_the_attempt_s_record_adds_up_its_images(session):
    lease = a_lease(session, num_images=2)

    hand_off(
        session,
        lease,
        0,
        steps=4,
        shared_steps=4,
        max_rows=6,
        max_images=3,
        mean_rows=6.0,
        device_seconds=0.25,
    )
    hand_off(
        session,
        lease,
        1,
        steps=12,
        shared_steps=0,
        max_rows=2,
        max_images=1,
        mean_rows=2.0,
        device_seconds=0.5,
    )

    record = attempt_of(session, lease.job_id)
    assert (record.steps, record.shared_steps, record.max_rows, record.max_images) == (16, 4, 6, 3)
    assert (record.mean_rows, record.device_seconds) == (3.0, 0.75)


def late_writes():
    """Everything that a worker may still try under a lease that it lost."""
    return [
        pytest.param(lambda session, lease: hand_off(session, lease), id="hand_off"),
        pytest.param(
            lambda session, lease: leases.give_back(session, lease, reason="drain"), id="give_back"
        ),
        pytest.param(lambda session, lease: preempt(session, lease, left=[a_left()]), id="preempt"),
        pytest.param(
            lambda session, lease: note_resumption(session, lease, {0: 0}), id="note_resumption"
        ),
        pytest.param(
            lambda session, lease: leases.fail(
                session, lease, code=FailureCode.INTERNAL, detail="x"
            ),
            id="fail",
        ),
        pytest.param(
            lambda session, lease: leases.count_error(session, lease, detail="x", max_attempts=5),
            id="count_error",
        ),
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


def test_an_image_handed_off_before_its_lease_was_lost_is_stored_while_the_job_waits(session):
    lease = a_lease(session, num_images=2, ttl_s=-1)
    hand_off(session, lease, 0)
    job = lose(session, lease.job)

    assert store(session, job, 0, attempt=1) is job

    assert job.state == "queued"
    assert jobs.handed_off(session, job.id) == {}
    hand_off(session, a_lease(session, job), 1)
    assert store(session, job, 1, attempt=2).state == "succeeded"


def test_the_row_says_in_which_precision_its_images_were_rendered(session):
    lease = a_lease(session, precision="fp32")

    hand_off(session, lease, fingerprint_facts={"precision": "bf16"})

    assert lease.job.precision == "bf16"


def test_a_vanished_hand_off_sends_back_only_what_is_gone(session):
    lease = a_lease(session, num_images=3)
    for index in range(3):
        hand_off(session, lease, index)
    store(session, lease.job, 0)

    job = leases.lose_hand_off(session, lease.job_id, [1], attempt_of={1: 1, 2: 1})

    assert (job.state, job.counted_attempts) == ("queued", 0)
    assert a_lease(session, job).pending == (1,)
    assert jobs.handed_off(session, job.id) == {2: 1}


def test_the_time_that_rendered_pixels_waited_for_the_store_does_not_use_up_the_run_deadline(
    session,
):
    lease = a_lease(session, run_within_s=60)
    hand_off(session, lease)
    session.execute(
        text("UPDATE jobs SET run_by = run_by - interval '1 hour' WHERE id = :id"),
        {"id": lease.job_id},
    )

    job = leases.lose_hand_off(session, lease.job_id, [0], attempt_of={0: 1})

    session.flush()
    assert sweeping.overruns(session) == []
    assert jobs.fail_past_deadline(session, job.id) is None
    assert 55 < a_lease(session, job).run_within_s <= 60


def test_pixels_that_vanish_while_the_job_still_runs_do_not_prolong_its_run_deadline(session):
    lease = a_lease(session, num_images=2, run_within_s=60)
    hand_off(session, lease, 0)
    run_by = lease.job.run_by

    leases.lose_hand_off(session, lease.job_id, [0], attempt_of={0: 1})

    session.refresh(lease.job)
    assert lease.job.run_by == run_by


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

    # image 0 is to be rendered again: the worker gives the job back
    assert lease.job.state == "running"
    leases.give_back(session, lease, reason="an image is to be rendered again")
    assert a_lease(session, lease.job).pending == (0,)


def test_pixels_of_a_newer_attempt_are_not_taken_for_the_lost_ones(session):
    lease = a_lease(session)
    hand_off(session, lease)
    leases.lose_hand_off(session, lease.job_id, [0], attempt_of={0: 1})
    hand_off(session, a_lease(session, lease.job))

    assert leases.lose_hand_off(session, lease.job_id, [0], attempt_of={0: 1}) is None

    assert lease.job.state == "storing"


def lose_pixels(session, lease, *indexes):
    attempt_of = dict.fromkeys(indexes, lease.attempt)
    return leases.lose_hand_off(session, lease.job_id, indexes, attempt_of=attempt_of)


def lose_pixels_again_and_again(session, job, times):
    """Render what is left of the job and lose the pixels of its image 0, so many times."""
    for _ in range(times):
        lease = a_lease(session, job)
        for index in lease.pending:
            hand_off(session, lease, index)
        job = lose_pixels(session, lease, 0)
    return job


def test_job_whose_pixels_are_lost_over_and_over_fails_at_the_fifth_time(session):
    job = lose_pixels_again_and_again(session, a_job(session), times=4)
    assert (job.state, job.counted_attempts) == ("queued", 0)

    job = lose_pixels_again_and_again(session, job, times=1)

    assert (job.state, job.failure_code, job.attempt) == ("failed", FailureCode.NOT_STORED, 5)
    assert job.failure_detail == "image 0: its pixels were lost 5 times before they could be stored"
    assert is_our_fault(FailureCode.NOT_STORED)
    assert (job.store_by, job.lease_expires_at) == (None, None)
    events = events_of(session, job.id)
    assert events.count("job:hand-off:lost") == 5
    assert events[-1] == "job:state:failed"


def test_job_that_cannot_be_stored_keeps_what_was_stored_of_it_and_is_paid_for_that(session):
    job = a_job(session, num_images=3)
    lease = a_lease(session, job)
    for index in lease.pending:
        hand_off(session, lease, index)
    stored = store(session, job, 1)
    cost = stored.cost
    lose_pixels(session, lease, 0)

    job = lose_pixels_again_and_again(session, job, times=4)

    assert (job.state, job.cost) == ("failed", cost)
    assert cost > 0
    states = select(Image.state).where(Image.job_id == job.id).order_by(Image.index)
    assert list(session.scalars(states)) == ["pending", "stored", "handed_off"]


def test_lost_pixels_are_counted_by_image(session):
    job = a_job(session, num_images=2)
    for _ in range(3):
        lease = a_lease(session, job)
        for index in lease.pending:
            hand_off(session, lease, index)
        job = lose_pixels(session, lease, 0, 1)

    counts = select(Image.hand_offs_lost).where(Image.job_id == job.id)
    assert list(session.scalars(counts)) == [3, 3], "six losses, none of which is a fifth"
    assert job.state == "queued"


def test_job_that_fails_by_lost_pixels_while_it_runs_is_taken_from_its_worker(session):
    lease = a_lease(session, num_images=2)
    hand_off(session, lease, 0)
    image_of(session, lease.job, 0).hand_offs_lost = 4

    job = lose_pixels(session, lease, 0)

    session.flush()
    assert job.state == "failed"
    assert attempt_of(session, job.id).outcome == "failed"
    with pytest.raises(LeaseLost):
        hand_off(session, lease, 1)


def test_wasted_device_time_goes_on_the_attempt_s_account(session):
    lease = a_lease(session)

    leases.note_waste(session, lease, device_seconds=1.5, steps_done={0: 3})
    leases.count_error(session, lease, detail="x", max_attempts=5)

    record = attempt_of(session, lease.job_id)
    assert (record.device_seconds, record.waste_class) == (1.5, "error")
    assert lease.job.device_seconds == 0


def test_a_preempted_job_waits_again_in_its_old_place_and_it_does_not_count_as_a_try(session):
    job = a_job(session, release_tag=12.5, num_images=2)

    for _ in range(7):
        preempt(session, a_lease(session, job), reason="spot")

    assert (job.state, job.worker, job.lease_expires_at, job.announced_at) == (
        "queued",
        None,
        None,
        None,
    )
    assert (job.release_tag, job.attempt, job.counted_attempts) == (12.5, 7, 0)
    record = attempt_of(session, job.id, 7)
    assert (record.outcome, record.error, record.ended_at is None) == ("preempted", "spot", False)
    assert events_of(session, job.id).count("job:lease:preempted") == 7


def test_a_preempted_attempt_has_what_it_leaves_on_record(session):
    lease = a_lease(session, num_images=2, num_steps=10)

    preempt(
        session,
        lease,
        left=[a_left(0, steps_done=3, size_bytes=1000), a_left(1, steps_done=7, size_bytes=24)],
        kept_in="handoff",
    )

    images = [image_of(session, lease.job, index) for index in (0, 1)]
    assert [(image.state, image.snapshot_ref, image.steps_done) for image in images] == [
        ("pending", "handoff:snapshot#0", 3),
        ("pending", "handoff:snapshot#1", 7),
    ]
    record = attempt_of(session, lease.job_id)
    assert (record.snapshot_bytes, record.snapshot_store) == (1024, "handoff")
    facts = "SELECT facts FROM audit_log WHERE job_id = :id AND event = 'job:lease:preempted'"
    assert session.scalar(text(facts), {"id": lease.job_id}) == {
        "reason": "spot",
        "snapshots": 2,
        "snapshot_bytes": 1024,
        "steps_done": {"0": 3, "1": 7},
    }


@pytest.mark.parametrize(
    ("left", "waste_class"),
    [([0, 1], None), ([0], "preempted"), ([], "preempted")],
    ids=["of every image", "of some", "of none"],
)
def test_an_attempt_that_leaves_a_snapshot_of_every_image_wasted_nothing(
    session, left, waste_class
):
    lease = a_lease(session, num_images=2)

    preempt(session, lease, left=[a_left(index) for index in left])

    record = attempt_of(session, lease.job_id)
    assert (record.waste_class, record.snapshot_store) == (waste_class, "handoff" if left else None)


def test_images_that_were_finished_before_the_notice_are_not_rendered_again(session):
    lease = a_lease(session, num_images=2)
    hand_off(session, lease, 0)

    preempt(session, lease, left=[a_left(1)])

    assert attempt_of(session, lease.job_id).waste_class is None
    assert a_lease(session, lease.job).pending == (1,)


def test_device_time_behind_a_snapshot_is_the_tenant_s_once_and_each_attempt_s_its_own(session):
    lease = a_lease(session)
    preempt(session, lease, left=[a_left(steps_done=1, device_seconds=0.25)])
    second = a_lease(session, lease.job)
    note_resumption(session, second, {0: 1})
    preempt(session, second, left=[a_left(steps_done=3, device_seconds=0.5)])
    third = a_lease(session, lease.job)
    note_resumption(session, third, {0: 3})

    hand_off(session, third, device_seconds=0.125, steps=1)
    job = store(session, lease.job, attempt=3)

    assert job.device_seconds == 0.875
    assert [attempt_of(session, job.id, number).device_seconds for number in (1, 2, 3)] == [
        0.25,
        0.5,
        0.125,
    ]


def test_an_image_that_begins_anew_drops_what_it_had_carried(session):
    lease = a_lease(session, num_images=2)
    preempt(session, lease, left=[a_left(0, device_seconds=0.25), a_left(1, device_seconds=0.25)])
    again = a_lease(session, lease.job)

    note_resumption(session, again, {0: 0, 1: 2}, lost_steps=2)

    images = [image_of(session, lease.job, index) for index in (0, 1)]
    assert [(image.device_seconds, image.steps_done) for image in images] == [(0, 0), (0.25, 2)]
    assert [image.snapshot_ref is None for image in images] == [True, False]
    for index in (0, 1):
        hand_off(session, again, index, device_seconds=0.5)
        job = store(session, lease.job, index, attempt=2)
    assert job.device_seconds == 1.25


@pytest.mark.parametrize(
    ("ended", "cause"),
    [
        (lambda session, lease: lose(session, lease.job), "lease_lost"),
        (lambda session, lease: preempt(session, lease, left=[a_left()]), "preempted"),
        (
            lambda session, lease: leases.count_error(session, lease, detail="x", max_attempts=5),
            "error",
        ),
        (lambda session, lease: leases.give_back(session, lease, reason="drain"), "returned"),
    ],
    ids=["lost", "preempted", "an error", "given back"],
)
def test_steps_that_are_done_again_are_on_record_with_how_the_attempt_that_had_done_them_ended(
    session, ended, cause
):
    lease = a_lease(session, num_images=2, num_steps=20, ttl_s=-1)
    preempt(session, lease)
    lease = a_lease(session, lease.job, ttl_s=-1)
    ended(session, lease)
    again = a_lease(session, lease.job)

    assert note_resumption(session, again, {0: 10, 1: 5}, lost_steps=4) == cause

    record = attempt_of(session, lease.job_id, 3)
    assert (record.resumed_steps, record.lost_steps, record.lost_cause) == (15, 4, cause)


def test_where_no_step_is_lost_there_is_no_cause(session):
    lease = a_lease(session)
    preempt(session, lease, left=[a_left(steps_done=2)])
    again = a_lease(session, lease.job)

    assert note_resumption(session, again, {0: 2}) is None

    record = attempt_of(session, lease.job_id, 2)
    assert (record.resumed_steps, record.lost_steps, record.lost_cause) == (2, 0, None)


def test_a_zombie_does_not_drop_what_a_later_attempt_goes_on_from(session):
    lease = a_lease(session)
    preempt(session, lease, left=[a_left(steps_done=2, device_seconds=0.25)])
    zombie = a_lease(session, lease.job, ttl_s=-1)
    lose(session, lease.job)
    later = a_lease(session, lease.job)
    note_resumption(session, later, {0: 2})

    with pytest.raises(LeaseLost):
        note_resumption(session, zombie, {0: 0}, lost_steps=2)

    image = image_of(session, lease.job)
    assert (image.device_seconds, image.steps_done, image.snapshot_ref) == (
        0.25,
        2,
        "handoff:snapshot#0",
    )


def test_a_worker_that_was_started_again_knows_that_its_predecessor_s_leases_are_nobody_s(session):
    lease, another_s = (
        a_lease(session, worker="restarted@here", ttl_s=600),
        a_lease(session, worker="another@here", ttl_s=600),
    )
    assert leases.running_on(session, "restarted@here") == [lease.job_id]

    job = leases.lose(session, lease.job_id, max_attempts=5, worker="restarted@here")

    assert (job.state, job.counted_attempts) == ("queued", 1)
    record = attempt_of(session, job.id)
    assert (record.outcome, record.waste_class, record.error) == (
        "lease_lost",
        "lease_lost",
        "restarted@here was started again",
    )
    assert leases.lose(session, another_s.job_id, max_attempts=5, worker="restarted@here") is None
    assert leases.running_on(session, "restarted@here") == []
    assert another_s.job.state == "running"


def test_a_job_without_a_run_deadline_has_all_the_time(session):
    lease = a_lease(session)

    assert (lease.run_within_s, lease.job.run_by) == (None, None)


def test_a_later_attempt_has_what_is_left_of_the_run_deadline_and_not_the_whole(session):
    job = a_job(session, run_within_s=100)
    first = a_lease(session, job)
    preempt(session, first)
    session.execute(
        text("UPDATE jobs SET run_by = run_by - interval '70 seconds' WHERE id = :id"),
        {"id": job.id},
    )

    second = a_lease(session, job)

    assert 95 < first.run_within_s <= 100
    assert 25 < second.run_within_s <= 30


def test_past_its_run_deadline_an_attempt_has_no_time_rather_than_less(session):
    job = a_job(session, run_within_s=100)
    preempt(session, a_lease(session, job))
    session.execute(
        text("UPDATE jobs SET run_by = run_by - interval '200 seconds' WHERE id = :id"),
        {"id": job.id},
    )

    assert a_lease(session, job).run_within_s == 0


def test_text_without_effect_is_noted_once_and_on_record(session):
    job = a_job(session)
    lease = a_lease(session, job)
    cut = {
        "code": "prompt_truncated",
        "field": "prompt",
        "detail": "…",
        "tokens_given": 30,
        "tokens_read": 22,
    }

    assert leases.warn(session, lease, [cut]) == [cut]
    assert leases.warn(session, lease, [cut]) == []

    session.flush()
    session.refresh(job)
    assert job.warnings == [cut]
    query = text(
        "SELECT facts FROM audit_log WHERE job_id = :id AND event = 'job:text:left-unread'"
    )
    facts = session.scalars(query, {"id": job.id}).one()
    assert facts == {
        "code": "prompt_truncated",
        "field": "prompt",
        "tokens_given": 30,
        "tokens_read": 22,
    }


def test_a_worker_that_lost_the_lease_notes_nothing_of_its_texts(session):
    lease = a_lease(session, ttl_s=-1)
    lose(session, lease.job)

    with pytest.raises(LeaseLost):
        leases.warn(session, lease, [{"code": "prompt_truncated", "field": "prompt"}])
