"""Jobs that start from pictures.

Whose are brought next, and how they stand in nobody's way until they were.
"""

import uuid

import pytest
from sqlalchemy import text

from models import files, inputs, jobs, leases, releasing, sweeping
from models.tables import Job
from policy.release import ReleaseLimits
from policy.states import JobState
from tests.builders import a_job, a_lease, a_tenant, hand_off


@pytest.fixture
def pool() -> str:
    """A pool that no other test knows."""
    return f"pool-{uuid.uuid4().hex[:8]}"


def a_file(session, tenant):
    digest = uuid.uuid4().hex * 2
    facts = {
        "object_key": f"t/x/{digest}",
        "mode": "RGB",
        "size_bytes": 9,
        "width_px": 8,
        "height_px": 8,
        "content_sha256": digest,
    }
    return files.keep(session, tenant_id=tenant.id, actor="tests", **facts)


def a_picture_job(session, pool, tenant=None, **params) -> Job:
    tenant = tenant or a_tenant(session)
    job = a_job(
        session,
        tenant=tenant,
        pool=pool,
        init_file_id=a_file(session, tenant).id,
        strength=0.5,
        **params,
    )
    session.refresh(job)
    return job


def pick(session, pool) -> list[uuid.UUID]:
    return [
        job.job_id
        for job in releasing.pick(
            session, pool=pool, tier="fast", limits=ReleaseLimits(slots=8, limit_images=12)
        )
    ]


def ask(session, pool, most=4) -> list[uuid.UUID]:
    return inputs.ask(session, pool=pool, tier="fast", most=most)


def miss_start(session, job, by_s) -> None:
    """Let the job have been accepted so early that its start deadline passed so long ago."""
    missed = "clock_timestamp() - make_interval(secs => :by_s)"
    statement = text(
        f"UPDATE jobs SET accepted_at = accepted_at - (start_by - ({missed})), "
        f"start_by = {missed} WHERE id = :id"
    )
    session.execute(statement, {"by_s": by_s, "id": job.id})


def test_a_job_lacks_the_pictures_it_starts_from_and_another_one_nothing(session, pool):
    tenant = a_tenant(session)
    controlled = a_job(
        session, tenant=tenant, pool=pool, control_file_id=a_file(session, tenant).id
    )
    plain = a_job(session, pool=pool)
    for job in (controlled, plain):
        session.refresh(job)

    assert a_picture_job(session, pool).lacks_inputs
    assert controlled.lacks_inputs
    assert not plain.lacks_inputs


def test_a_job_that_lacks_its_pictures_is_passed_by_others_and_takes_no_room(session, pool):
    for number in range(20):
        a_picture_job(session, pool, release_tag=float(number))
    plain = a_job(session, pool=pool, release_tag=100.0)

    assert pick(session, pool) == [plain.id]


def test_once_its_pictures_are_there_it_has_the_place_it_had(session, pool):
    late = a_job(session, pool=pool, release_tag=2.0)
    job = a_picture_job(session, pool, release_tag=1.0)

    assert inputs.note_brought(session, job.id) is not None

    assert pick(session, pool) == [job.id, late.id]
    assert inputs.note_brought(session, job.id) is None, "they were there"


def test_pictures_are_asked_for_in_fair_order_for_no_more_jobs_than_there_is_room_for(
    session, pool
):
    tenant = a_tenant(session)
    ids = [
        a_picture_job(session, pool, tenant, release_tag=float(number)).id for number in range(6)
    ]

    assert set(ask(session, pool)) == set(ids[:4])
    assert ask(session, pool) == []

    inputs.note_brought(session, ids[0])
    assert ask(session, pool) == [], "there, and not yet taken"
    a_lease(session, session.get(Job, ids[0]))
    assert ask(session, pool) == [ids[4]]


def test_behind_one_tenant_s_many_another_s_are_asked_for_all_the_same(session, pool):
    dumper = a_tenant(session)
    for number in range(10):
        a_picture_job(session, pool, dumper, release_tag=float(number))
    ask(session, pool)
    other = a_picture_job(session, pool, release_tag=50.0)

    assert ask(session, pool) == [other.id]
    assert ask(session, pool) == []


def test_pictures_asked_for_in_vain_are_asked_for_again_and_unasked_ones_later(session, pool):
    job = a_picture_job(session, pool)
    assert inputs.ask_again(session, pool=pool, tier="fast", asked_before_s=-1) == [], (
        "nobody was asked"
    )
    ask(session, pool)

    assert inputs.ask_again(session, pool=pool, tier="fast", asked_before_s=60) == []
    assert inputs.ask_again(session, pool=pool, tier="fast", asked_before_s=-1) == [job.id]
    inputs.forget_asking(session, [job.id])

    assert ask(session, pool) == [job.id]


def test_tiers_and_counts_tell_where_pictures_are_missing(session, pool):
    a_job(session, pool=pool, tier="batch")
    a_picture_job(session, pool)
    job = a_picture_job(session, pool)

    assert inputs.tiers_lacking(session, pool=pool, tiers=["fast", "batch"]) == {"fast"}
    assert (pool, "fast") not in inputs.asked_and_lacking(session)
    ask(session, pool)
    inputs.note_brought(session, job.id)
    assert inputs.asked_and_lacking(session)[pool, "fast"] == 1


def test_no_lease_is_given_on_a_job_that_lacks_its_pictures(session, pool):
    job = a_picture_job(session, pool)

    assert leases.take(session, job.id, worker="w", device="cpu", ttl_s=15) is None
    inputs.note_brought(session, job.id)
    assert leases.take(session, job.id, worker="w", device="cpu", ttl_s=15) is not None


def test_a_job_given_back_for_lack_of_pictures_waits_for_them_again(session, pool):
    job = a_picture_job(session, pool)
    inputs.note_brought(session, job.id)
    lease = a_lease(session, job)

    leases.give_back(session, lease, reason="InputsMissing", lacks_inputs=True)

    session.flush()
    assert pick(session, pool) == []
    assert ask(session, pool) == [job.id]


def test_a_job_whose_pixels_were_lost_has_its_pictures_brought_again(session, pool):
    job, plain = a_picture_job(session, pool), a_job(session, pool=pool)
    inputs.note_brought(session, job.id)
    for lost in (job, plain):
        hand_off(session, a_lease(session, lost))
        leases.lose_hand_off(session, lost.id, [0], attempt_of={0: 1})
    session.flush()

    assert (job.state, job.lacks_inputs) == (JobState.QUEUED, True)
    assert pick(session, pool) == [plain.id]


def test_a_job_whose_pictures_were_asked_for_has_its_run_time_to_wait_for_them(session, pool):
    asked, unasked = (
        a_picture_job(session, pool, run_within_s=100.0, release_tag=1.0),
        a_picture_job(session, pool, release_tag=2.0),
    )
    assert ask(session, pool, most=1) == [asked.id]
    for job in (asked, unasked):
        miss_start(session, job, by_s=60)

    assert asked.id not in sweeping.missed_starts(session)
    assert unasked.id in sweeping.missed_starts(session)
    assert jobs.expire(session, asked.id) is None
    inputs.note_brought(session, asked.id)
    assert asked.id not in sweeping.missed_starts(session)
    assert leases.take(session, asked.id, worker="w", device="cpu", ttl_s=15) is not None


def test_a_job_whose_pictures_have_come_has_to_start_as_soon_as_any_other(session, pool):
    job = a_picture_job(session, pool, run_within_s=100.0)
    ask(session, pool)
    inputs.note_brought(session, job.id)
    miss_start(session, job, by_s=1)

    assert leases.take(session, job.id, worker="w", device="cpu", ttl_s=15) is None
    assert job.id in sweeping.missed_starts(session)
    assert jobs.expire(session, job.id).state == JobState.EXPIRED


def test_a_job_does_not_wait_for_its_pictures_for_ever(session, pool):
    job = a_picture_job(session, pool, run_within_s=100.0)
    ask(session, pool)
    miss_start(session, job, by_s=101)

    assert job.id in sweeping.missed_starts(session)
    assert jobs.expire(session, job.id).state == JobState.EXPIRED
