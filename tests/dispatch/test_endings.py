"""What follows a job's end, whoever ended it: it is told, and what was kept for it is dropped."""

import json
import uuid

import pytest

from dispatch.endings import EndedJobs, lose_hand_off
from dispatch.release import Release
from edges.broker import Broker, job_of_message
from edges.progress import CANCELS, ENDINGS, ProgressWriter, Step
from models import erasing, jobs, leases, workers
from models.database import transaction
from models.tables import Image
from policy.failures import FailureCode
from tests.builders import (
    GONE,
    a_closed_port,
    a_fleet,
    a_job,
    a_lease,
    a_succeeded_job,
    hand_off,
    some_pixels,
    until,
)
from tests.metrics import increases


@pytest.fixture
def ended(settings, handoff_redis) -> EndedJobs:
    return EndedJobs.connect(settings.handoff_url, ttl_s=60)


@pytest.fixture
def told(handoff_redis):
    """Tell which channels have heard of a job by now, in order."""
    with handoff_redis.pubsub(ignore_subscribe_messages=True) as pubsub:
        pubsub.subscribe(CANCELS, ENDINGS)
        for _ in range(2):
            pubsub.get_message(timeout=60)  # that it has subscribed

        def told(job_id) -> list[str]:
            handoff_redis.publish(ENDINGS, json.dumps({"job_id": "the last word"}))
            heard = []
            while True:
                message = pubsub.get_message(timeout=60)
                assert message is not None, "not even the last word came"
                subject = json.loads(message["data"])["job_id"]
                if subject == "the last word":
                    return heard
                if subject == str(job_id):
                    heard.append(message["channel"].decode())

        yield told


def leave_traces(ended, lease) -> None:
    """Leave in Redis what there is of a job that starts from a picture and of which one image is
    handed on.
    """
    ended.handoff.put(lease.job_id, 0, lease.attempt, some_pixels())
    ended.snapshots.put(lease.job_id, 1, lease.attempt, 3, b"latents")
    ended.inputs.bring(lease.job_id, {"init_image": some_pixels()})


def kinds_of_traces(handoff_redis, job_id) -> set[str]:
    return {key.decode().partition(":")[0] for key in handoff_redis.keys(f"*{job_id}*")}


def canceled(database, lease):
    with transaction(database.app) as session:
        return jobs.cancel(session, lease.job_id, tenant_id=lease.job.tenant_id, actor="tests")


def test_job_that_is_canceled_under_way_is_taken_from_its_worker_and_told_of(database, ended, told):
    with transaction(database.app) as session:
        lease = a_lease(session)

    ended.notify_ended(canceled(database, lease))

    assert told(lease.job_id) == [CANCELS, ENDINGS]


def test_job_whose_lease_was_lost_is_taken_from_the_worker_that_may_still_render_it(
    database, ended, told
):
    with transaction(database.app) as session:
        lease = a_lease(session, ttl_s=-1)
        leases.lose(session, lease.job_id, max_attempts=5)

    ended.notify_ended(canceled(database, lease))

    assert told(lease.job_id) == [CANCELS, ENDINGS]


@pytest.mark.parametrize("state", ["expired", "succeeded"])
def test_no_worker_is_told_of_a_job_that_none_renders(database, ended, told, state):
    with transaction(database.app) as session:
        if state == "succeeded":
            job = a_succeeded_job(session)
        else:
            job = jobs.expire(session, a_job(session, start_within_s=-1).id)
        assert job.state == state

    ended.notify_ended(job)

    assert told(job.id) == [ENDINGS]


def test_each_end_is_counted_once_whoever_tells_of_it_again(database, ended):
    with transaction(database.app) as session:
        lease, late = a_lease(session), a_job(session, start_within_s=-1)
    one = {"tier": "fast", "model": "pocket"}

    with increases() as grown:
        ended.notify_ended(canceled(database, lease))
        ended.notify_ended(canceled(database, lease))  # repeated by its tenant
        ended.run_ending(database.app, lambda session: jobs.expire(session, late.id))
        with transaction(database.app) as session:
            who = {"tenant_id": late.tenant_id, "actor": "tests"}
            gone = erasing.erase(session, late.id, **who)
        ended.notify_erased(gone)

    labels = ",".join(f'{name}="{value}"' for name, value in one.items())
    told = {name: count for name, count in grown.items() if name.startswith("jobs_ended")}
    assert told == {
        f'jobs_ended{{{labels},state="canceled"}}': 1,
        f'jobs_ended{{{labels},state="expired"}}': 1,
    }


def test_job_that_ended_leaves_neither_snapshots_nor_pictures(database, ended, handoff_redis):
    with transaction(database.app) as session:
        lease, other = a_lease(session, num_images=2), a_lease(session, num_images=2)
    leave_traces(ended, lease)
    leave_traces(ended, other)

    ended.notify_ended(canceled(database, lease))

    assert kinds_of_traces(handoff_redis, lease.job_id) == {"handoff"}, (
        "the sweeper's, for a worker may be putting more"
    )
    assert kinds_of_traces(handoff_redis, other.job_id) == {"handoff", "snapshot", "input"}


def test_job_that_was_erased_leaves_nothing_in_the_hand_off(
    settings, database, ended, handoff_redis, told
):
    with transaction(database.app) as session:
        lease = a_lease(session, num_images=2)
        hand_off(session, lease, 0)
    leave_traces(ended, lease)
    # and nobody was told of it yet
    ended.handoff.put(lease.job_id, 1, lease.attempt, some_pixels())
    writer = ProgressWriter(settings.handoff_url)
    writer.note(lease.job_id, Step(1, 3, 20))
    until(lambda: ended.signals.steps(lease.job_id), what="the progress")
    writer.close()
    with transaction(database.app) as session:
        job = erasing.erase(session, lease.job_id, tenant_id=lease.job.tenant_id, actor="tests")

    ended.notify_erased(job)

    assert kinds_of_traces(handoff_redis, job.id) == set()
    assert told(job.id) == [CANCELS, ENDINGS]


def test_job_ends_also_while_the_hand_off_is_away(database):
    away = EndedJobs.connect(f"redis://127.0.0.1:{a_closed_port()}/0", ttl_s=60)
    with transaction(database.app) as session:
        lease = a_lease(session)

    away.notify_ended(canceled(database, lease))
    away.notify_erased(canceled(database, lease))


@pytest.mark.parametrize(("max_attempts", "channels"), [(1, [CANCELS, ENDINGS]), (5, [])])
def test_change_that_ends_its_job_is_told_and_no_other(
    database, ended, told, max_attempts, channels
):
    with transaction(database.app) as session:
        lease = a_lease(session)

    job = ended.run_ending(
        database.app,
        lambda session: leases.count_error(session, lease, detail="x", max_attempts=max_attempts),
    )

    assert job.state == ("failed" if channels else "queued")
    assert told(lease.job_id) == channels


def test_change_that_found_nothing_to_do_tells_nothing(database, ended, told):
    with transaction(database.app) as session:
        lease = a_lease(session)

    assert ended.run_ending(database.app, lambda session: None) is None
    assert told(lease.job_id) == []


@pytest.fixture
def pool() -> str:
    return f"pool-{uuid.uuid4().hex[:8]}"


@pytest.fixture
def release(database, settings, broker_redis, pool) -> Release:
    shape = {"models": ["pocket"], "slots": 8, "max_batch_rows": 8}
    fleet = a_fleet({f"pools.{pool}": shape, "pools.local": GONE})
    with transaction(database.app) as session:
        workers.heartbeat(
            session,
            name=f"cpu0@{pool}",
            pool=pool,
            device="cpu",
            slots=8,
            facts={},
            silent_after_s=15,
        )
    return Release(database.app, Broker(settings, fleet), fleet, worker_silence_s=15)


def a_rendered_job(database, pool, *, lost: int):
    """A storing job that has lost its pixels so many times."""
    with transaction(database.app) as session:
        lease = a_lease(session, pool=pool)
        hand_off(session, lease)
        session.get(Image, (lease.job_id, 0)).hand_offs_lost = lost
    return lease.job


def test_job_whose_pixels_are_gone_is_announced_again(
    database, ended, release, broker_redis, told, pool
):
    job = a_rendered_job(database, pool, lost=0)

    after = lose_hand_off(database.app, ended, job.id, [0], attempt_of={0: 1}, release=release)

    assert after.state == "queued"
    messages = broker_redis.lrange(f"{pool}.fast", 0, -1) + broker_redis.lrange(
        f"{pool}.fast.front", 0, -1
    )
    assert [job_of_message(message) for message in messages] == [job.id]
    assert told(job.id) == []


def test_job_whose_pixels_are_gone_for_the_fifth_time_fails_and_is_told_of(
    database, ended, release, told, pool
):
    job = a_rendered_job(database, pool, lost=4)

    after = lose_hand_off(database.app, ended, job.id, [0], attempt_of={0: 1}, release=release)

    assert (after.state, after.failure_code) == ("failed", FailureCode.NOT_STORED)
    assert told(job.id) == [CANCELS, ENDINGS]


def test_pixels_of_another_attempt_are_not_taken_for_the_lost_ones(
    database, ended, release, told, pool
):
    job = a_rendered_job(database, pool, lost=4)

    assert (
        lose_hand_off(database.app, ended, job.id, [0], attempt_of={0: 2}, release=release) is None
    )
    assert told(job.id) == []
