"""The life of a job: what each arrow of its states writes, and what it refuses."""

import uuid
from decimal import Decimal

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from models import jobs, leases, listing, sweeping
from models.database import transaction
from models.jobs import JobAlreadyFinished
from models.listing import JobFilter
from policy.failures import FailureCode
from policy.params import NAMES
from tests.builders import a_job, a_lease, a_succeeded_job, a_tenant, hand_off, preempt, store
from tests.models.facts import at_once, attempt_of, events_of


def cancel(session, job):
    return jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")


def requeue(session, job):
    return jobs.requeue_dead(session, job.id, start_within_s=600, actor="cli")


def a_dead_letter(session, **params):
    """A job that failed twice, on two workers."""
    job = a_job(session, **params)
    for worker in ("gpu1@here", "gpu0@there"):
        leases.count_error(
            session,
            a_lease(session, job, worker=worker),
            detail=f"{worker} said no",
            max_attempts=2,
        )
    return job


def columns_of(session, job) -> dict:
    session.flush()
    return dict(
        session.execute(text("SELECT * FROM jobs WHERE id = :id"), {"id": job.id}).mappings().one()
    )


def test_an_accepted_job_waits_with_all_its_images(session):
    job = a_job(session, num_images=3, seed=40)

    assert (job.state, job.attempt, job.cost, job.finished_at) == ("queued", 0, None, None)
    assert [(image.index, image.seed, image.state) for image in job.images] == [
        (0, 40, "pending"),
        (1, 41, "pending"),
        (2, 42, "pending"),
    ]
    assert events_of(session, job.id) == ["job:request:accepted"]


def test_a_rolled_back_accept_leaves_nothing(database):
    with Session(database.app) as session:
        job_id = a_job(session).id
        session.rollback()  # the gateway was killed here

    with transaction(database.app) as session:
        assert jobs.state_of(session, job_id) is None
        assert events_of(session, job_id) == []


def test_neither_prompt_nor_negative_prompt_reach_the_audit_log(session):
    job = a_job(session, prompt="a secret wish", negative_prompt="a hidden fear")

    lines = session.scalars(
        text("SELECT facts::text FROM audit_log WHERE job_id = :id"), {"id": job.id}
    )

    assert not any("secret" in line or "hidden" in line for line in lines)


def test_a_stored_image_has_one_artifact_however_often_its_message_comes(session):
    lease = a_lease(session, num_images=2)
    hand_off(session, lease, 0)
    hand_off(session, lease, 1)

    first, again = store(session, lease.job, 0), store(session, lease.job, 0)

    assert (first.state, again) == ("storing", None)
    assert (
        session.scalar(
            text("SELECT count(*) FROM artifacts WHERE job_id = :id"), {"id": lease.job_id}
        )
        == 1
    )
    assert events_of(session, lease.job_id).count("job:image:stored") == 1


def test_two_deliveries_at_once_write_one_artifact(database):
    with transaction(database.app) as session:
        lease = a_lease(session)
        hand_off(session, lease)

    def store_it():
        with transaction(database.app) as session:
            return store(session, lease.job)

    stored = at_once(*[store_it] * 4)

    assert len([job for job in stored if job]) == 1
    with transaction(database.app) as session:
        assert events_of(session, lease.job_id)[-2:] == ["job:image:stored", "job:state:succeeded"]
        assert (
            session.scalar(
                text("SELECT count(*) FROM artifacts WHERE job_id = :id"), {"id": lease.job_id}
            )
            == 1
        )


def test_the_last_stored_image_makes_the_job_succeed_with_its_price(session):
    lease = a_lease(session, num_images=2)
    for index in range(2):
        hand_off(session, lease, index, device_seconds=900.0)
    store(session, lease.job, 1)

    job = store(session, lease.job, 0)

    assert (job.state, job.finished_at is None, job.store_by) == ("succeeded", False, None)
    # 1.20 an hour, twice the weight
    assert (job.device_seconds, job.cost, job.currency) == (1800.0, Decimal("1.200000"), "EUR")
    assert events_of(session, job.id)[-3:] == [
        "job:image:stored",
        "job:image:stored",
        "job:state:succeeded",
    ]


def test_artifact_state_cost_and_audit_events_are_written_together_or_not_at_all(database):
    with transaction(database.app) as session:
        lease = a_lease(session)
        hand_off(session, lease)

    with Session(database.app) as session:
        assert store(session, lease.job).state == "succeeded"
        session.rollback()  # the results worker was killed here

    with transaction(database.app) as session:
        row = session.execute(
            text("SELECT state, cost, device_seconds FROM jobs WHERE id = :id"),
            {"id": lease.job_id},
        ).one()
        assert tuple(row) == ("storing", None, 0)
        assert (
            session.scalar(
                text("SELECT count(*) FROM artifacts WHERE job_id = :id"), {"id": lease.job_id}
            )
            == 0
        )
        assert events_of(session, lease.job_id)[-1] == "job:image:handed-off"
        assert store(session, lease.job).state == "succeeded"


def test_pixels_of_another_attempt_are_not_stored(session):
    lease = a_lease(session)
    hand_off(session, lease)

    assert store(session, lease.job, attempt=2) is None
    assert lease.job.state == "storing"


def test_an_image_that_was_not_handed_off_cannot_be_stored(session):
    lease = a_lease(session)

    assert store(session, lease.job) is None
    assert store(session, lease.job, index=5) is None


def test_an_image_is_stored_while_its_siblings_are_still_rendered(session):
    lease = a_lease(session, num_images=2)
    hand_off(session, lease, 0)

    job = store(session, lease.job, 0)

    assert (job.state, job.lease_expires_at is None) == ("running", False)


@pytest.mark.parametrize("was", ["queued", "running", "storing"])
def test_an_unfinished_job_can_be_canceled(session, was):
    job = a_job(session)
    if was != "queued":
        lease = a_lease(session, job)
    if was == "storing":
        hand_off(session, lease)
    assert job.state == was

    canceled = cancel(session, job)

    assert (
        canceled.state,
        canceled.finished_at is None,
        canceled.lease_expires_at,
        canceled.store_by,
    ) == ("canceled", False, None, None)
    assert events_of(session, job.id)[-1] == "job:state:canceled"
    assert store(session, job) is None
    if was == "running":
        assert attempt_of(session, job.id).outcome == "canceled"


def test_canceling_twice_is_harmless(session):
    job = a_job(session)
    finished_at = cancel(session, job).finished_at

    again = cancel(session, job)

    assert (again.state, again.finished_at) == ("canceled", finished_at)
    assert events_of(session, job.id).count("job:state:canceled") == 1


def test_a_job_that_ended_otherwise_cannot_be_canceled(session):
    job = a_succeeded_job(session)

    with pytest.raises(JobAlreadyFinished) as refusal:
        cancel(session, job)

    assert refusal.value.state == "succeeded"
    assert events_of(session, job.id)[-1] == "job:state:succeeded"


def test_a_late_cancel_that_is_caught_outside_its_transaction_still_tells_the_state(database):
    with transaction(database.app) as session:
        job = a_succeeded_job(session)

    with pytest.raises(JobAlreadyFinished) as refusal, transaction(database.app) as session:
        cancel(session, job)

    assert refusal.value.state == "succeeded"


def test_another_tenant_s_job_does_not_exist(session):
    job, stranger = a_job(session), a_tenant(session)

    assert jobs.find(session, job.id, tenant_id=stranger.id) is None
    assert jobs.cancel(session, job.id, tenant_id=stranger.id, actor="tests") is None
    assert listing.page(session, JobFilter(), tenant_id=stranger.id, limit=10).jobs == []
    assert job.state == "queued"


def test_an_unknown_job_does_not_exist_either(session):
    assert jobs.find(session, uuid.uuid4(), tenant_id=uuid.uuid4()) is None
    assert jobs.cancel(session, uuid.uuid4(), tenant_id=uuid.uuid4(), actor="tests") is None


def test_a_page_is_newest_first_and_goes_on_where_the_last_one_ended(session):
    tenant = a_tenant(session)
    accepted = sorted((a_job(session, tenant=tenant).id for _ in range(5)), reverse=True)

    first = [
        job.id for job in listing.page(session, JobFilter(), tenant_id=tenant.id, limit=2).jobs
    ]
    rest = [
        job.id
        for job in listing.page(
            session, JobFilter(before=first[-1]), tenant_id=tenant.id, limit=10
        ).jobs
    ]

    assert first + rest == accepted


def test_a_page_can_be_of_one_state(session):
    tenant = a_tenant(session)
    a_job(session, tenant=tenant)
    canceled = cancel(session, a_job(session, tenant=tenant))

    assert listing.page(
        session, JobFilter(state="canceled"), tenant_id=tenant.id, limit=10
    ).jobs == [canceled]


def test_a_job_that_nothing_started_in_time_expires(session):
    job = a_job(session, start_within_s=-1)
    assert job.id in sweeping.missed_starts(session)

    jobs.expire(session, job.id)

    assert (job.state, job.finished_at is None) == ("expired", False)
    assert events_of(session, job.id) == ["job:request:accepted", "job:state:expired"]
    assert jobs.expire(session, job.id) is None


def test_a_job_that_was_started_or_still_has_time_does_not_expire(session):
    early, started = a_job(session, start_within_s=600), a_lease(session).job

    assert jobs.expire(session, early.id) is None
    assert jobs.expire(session, started.id) is None
    assert (early.state, started.state) == ("queued", "running")


def test_an_overdue_store_is_found_with_the_pixels_it_waits_for(session):
    lease = a_lease(session, num_images=2)
    hand_off(session, lease, 0)
    hand_off(session, lease, 1, store_within_s=-1)
    store_by_images = {
        unstored.job_id: unstored.attempt_of for unstored in sweeping.overdue_stores(session)
    }

    assert store_by_images[lease.job_id] == {0: 1, 1: 1}

    sweeping.postpone_store(session, lease.job_id, store_within_s=60)
    session.flush()
    assert lease.job_id not in {unstored.job_id for unstored in sweeping.overdue_stores(session)}


def test_the_history_shows_a_job_in_one_row(session):
    job = a_succeeded_job(session, num_images=2, tier="batch")

    row = session.execute(
        text("SELECT * FROM job_history WHERE job_id = :id"), {"id": job.id}
    ).one()

    assert (row.state, row.tier, row.size, row.num_images, row.attempts, row.steps_run) == (
        "succeeded",
        "batch",
        "128x128",
        2,
        1,
        8,
    )
    assert row.total_s >= 0
    assert row.cost == job.cost


def test_the_day_s_images_add_up_to_the_job_s_cost(session):
    tenant = a_tenant(session)
    job = a_succeeded_job(session, tenant=tenant, num_images=2)

    [row] = session.execute(
        text("SELECT * FROM images_by_tenant_day WHERE tenant = :name"), {"name": tenant.name}
    ).all()

    assert (row.images, row.cost, row.size_bytes) == (2, job.cost, 2000)


def test_a_job_that_waits_again_past_its_run_deadline_fails(session):
    job = a_job(session, run_within_s=0.5)
    preempt(session, a_lease(session, job))
    assert jobs.fail_past_deadline(session, job.id) is None
    session.execute(
        text("UPDATE jobs SET run_by = clock_timestamp() - interval '1 second' WHERE id = :id"),
        {"id": job.id},
    )

    assert jobs.fail_past_deadline(session, job.id) is job

    assert (job.state, job.failure_code, job.failure_detail) == (
        "failed",
        "run_deadline",
        "not rendered within 0.5 s of its start",
    )
    assert events_of(session, job.id)[-1] == "job:state:failed"
    assert jobs.fail_past_deadline(session, job.id) is None


def test_a_job_that_began_does_not_expire_when_it_waits_again_past_its_start_deadline(session):
    """Whoever looked for what expires may have seen it before a worker had it."""
    job = a_job(session)
    leases.give_back(session, a_lease(session, job), reason="drain")
    missed = text("UPDATE jobs SET start_by = clock_timestamp() - interval '1 s' WHERE id = :id")
    session.execute(missed, {"id": job.id})

    assert job.id not in sweeping.missed_starts(session)
    assert jobs.expire(session, job.id) is None
    assert job.state == "queued"
    assert a_lease(session, job).attempt == 2


def test_neither_a_running_job_nor_one_that_never_ran_is_past_its_run_deadline(session):
    running, waiting = a_lease(session, run_within_s=0).job, a_job(session, run_within_s=0)

    assert jobs.fail_past_deadline(session, running.id) is None
    assert jobs.fail_past_deadline(session, waiting.id) is None
    assert (running.state, waiting.state) == ("running", "queued")


REQUEUED = {
    "tier": "quality",
    "determinism": "reproducible",
    "bucket_rows": 8,
    "negative_prompt": "blue",
    "seed": 2**53 - 9,
    "num_images": 3,
    "num_steps": 17,
    "guidance": 2.5,
    "sampler": "euler",
    "height_px": 192,
    "output_format": "webp",
    "precision": "bf16",
    "model_version": "2",
}


def test_a_dead_letter_is_tried_again_as_a_new_job_with_every_parameter_the_same(session):
    dead = a_dead_letter(session, run_within_s=90, predicted_s=4, **REQUEUED)
    before = columns_of(session, dead)

    job = requeue(session, dead)

    assert (job.state, job.attempt, job.counted_attempts, job.failure_code, job.requeue_of) == (
        "queued",
        0,
        0,
        None,
        dead.id,
    )
    kept = ("tenant_id", "api_key_id", "currency", "run_within_s", "predicted_s", *NAMES)
    assert {name: getattr(job, name) for name in kept} == {name: before[name] for name in kept}
    assert [(image.index, image.seed, image.state) for image in job.images] == [
        (index, 2**53 - 9 + index, "pending") for index in range(3)
    ]
    assert job.release_tag > dead.release_tag
    assert columns_of(session, dead) == before
    facts = session.scalar(text("SELECT facts FROM audit_log WHERE job_id = :id"), {"id": job.id})
    assert facts["requeue_of"] == str(dead.id)


def test_a_dead_letter_is_requeued_once_and_its_successor_once_more(session):
    dead = a_dead_letter(session)
    again = requeue(session, dead)

    with pytest.raises(JobAlreadyFinished):
        requeue(session, dead)

    leases.fail(session, a_lease(session, again), code=FailureCode.INTERNAL, detail="x")
    assert requeue(session, again).requeue_of == again.id


def test_two_who_requeue_at_once_make_one_job(database):
    with transaction(database.app) as session:
        dead = a_dead_letter(session)

    def requeue_it():
        try:
            with transaction(database.app) as session:
                return requeue(session, dead)
        except JobAlreadyFinished:
            return None

    assert len([job for job in at_once(*[requeue_it] * 4) if job]) == 1


@pytest.mark.parametrize("state", ["queued", "running", "succeeded", "canceled"])
def test_only_what_failed_is_requeued(session, state):
    made = {
        "queued": a_job,
        "running": lambda s: a_lease(s).job,
        "succeeded": a_succeeded_job,
        "canceled": lambda s: cancel(s, a_job(s)),
    }
    job = made[state](session)
    assert job.state == state

    assert requeue(session, job) is None
    assert (
        session.scalar(text("SELECT count(*) FROM jobs WHERE requeue_of = :id"), {"id": job.id})
        == 0
    )


def test_nobody_requeues_what_there_is_not(session):
    assert jobs.requeue_dead(session, uuid.uuid4(), start_within_s=600, actor="cli") is None


def test_the_dead_letters_tell_why_where_and_what_became_of_them(session):
    tenant = a_tenant(session)
    dead, other = a_dead_letter(session, tenant=tenant), a_dead_letter(session, tenant=tenant)
    again = requeue(session, dead)

    rows = session.execute(
        text("SELECT * FROM dead_letters WHERE tenant = :name"), {"name": tenant.name}
    ).all()

    letters = {row.job_id: row for row in rows}
    assert set(letters) == {dead.id, other.id}
    row = letters[dead.id]
    assert (row.pool, row.tier, row.model, row.failure_code) == (
        "local",
        "fast",
        "pocket",
        "attempts_exhausted",
    )
    assert (row.last_error, row.attempts, row.counted_attempts) == ("gpu0@there said no", 2, 2)
    assert (row.workers, row.outcomes) == ("gpu0@there gpu1@here", "error error")
    assert (row.requeued_as, letters[other.id].requeued_as) == (again.id, None)
    assert row.finished_at >= row.accepted_at
