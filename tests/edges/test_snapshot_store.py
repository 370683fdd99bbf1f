"""Snapshots of images under way.

The newest of the latest attempt comes back, for a while, or everybody goes on without.
"""

import time
import uuid

import pytest

from edges.snapshots import STORE, Snapshots, SnapshotsUnavailable, StoredSnapshot, place
from tests.builders import a_closed_port, until


@pytest.fixture
def snapshots(settings, handoff_redis) -> Snapshots:
    return Snapshots(settings.handoff_url, ttl_s=60)


@pytest.fixture
def job_id() -> uuid.UUID:
    return uuid.uuid4()


def test_snapshots_come_back_by_image_with_the_attempt_that_made_them(snapshots, job_id):
    assert snapshots.put(job_id, 0, 1, 10, b"of image 0")
    assert snapshots.put(job_id, 11, 12, 10, b"of image 11")

    assert snapshots.of(job_id) == {
        0: StoredSnapshot(1, 10, b"of image 0"),
        11: StoredSnapshot(12, 10, b"of image 11"),
    }


@pytest.mark.parametrize(
    "blob",
    [b"", b" ", b"1 2 3", b"\x00\xff\r\n", bytes(range(256)) * 4096],
    ids=["none", "space", "text", "raw", "1 MB"],
)
def test_a_snapshot_is_any_bytes(snapshots, job_id, blob):
    snapshots.put(job_id, 0, 1, 10, blob)

    assert snapshots.of(job_id) == {0: StoredSnapshot(1, 10, blob)}


def test_of_one_attempt_the_one_of_the_latest_step_is_kept_whatever_comes_last(snapshots, job_id):
    for step, blob in ((9, b"step 9"), (20, b"step 20")):
        assert snapshots.put(job_id, 0, 1, step, blob)
    assert not snapshots.put(job_id, 0, 1, 10, b"step 10, which waited for its turn")

    assert snapshots.of(job_id) == {0: StoredSnapshot(1, 20, b"step 20")}


def test_a_later_attempt_s_replaces_an_earlier_one_s_of_whatever_step(snapshots, job_id):
    """Also past nine. It may have begun again: what the earlier one had was of no use to it."""
    for attempt, step in ((1, 30), (9, 20), (10, 4)):
        assert snapshots.put(job_id, 0, attempt, step, b"of %d" % attempt)

    assert snapshots.of(job_id) == {0: StoredSnapshot(10, 4, b"of 10")}


def test_a_snapshot_of_a_later_attempt_is_not_overwritten_by_an_earlier_one(snapshots, job_id):
    snapshots.put(job_id, 0, 10, 10, b"of the later")

    assert not snapshots.put(job_id, 0, 9, 20, b"of the zombie, which is further")
    assert snapshots.put(job_id, 1, 9, 10, b"of another image")

    assert snapshots.of(job_id) == {
        0: StoredSnapshot(10, 10, b"of the later"),
        1: StoredSnapshot(9, 10, b"of another image"),
    }


def test_a_job_of_which_nothing_is_kept_has_none(snapshots, job_id):
    assert snapshots.of(job_id) == {}


def test_snapshots_are_gone_when_their_time_is_over(settings, handoff_redis, job_id):
    snapshots = Snapshots(settings.handoff_url, ttl_s=60)
    snapshots.put(job_id, 0, 1, 10, b"a snapshot")
    assert snapshots.of(job_id)

    keys = handoff_redis.keys()
    assert all(50 < handoff_redis.ttl(key) <= 60 for key in keys)
    for key in keys:
        handoff_redis.pexpire(key, 1)

    until(lambda: not snapshots.of(job_id), within_s=60)
    assert handoff_redis.keys() == []


def test_every_snapshot_prolongs_the_life_of_its_job_s(snapshots, job_id, handoff_redis):
    snapshots.put(job_id, 0, 1, 10, b"a snapshot")
    [key] = handoff_redis.keys()
    handoff_redis.expire(key, 5)

    snapshots.put(job_id, 1, 1, 10, b"another")

    assert 50 < handoff_redis.ttl(key) <= 60


def test_a_zombie_does_not_prolong_it(snapshots, job_id, handoff_redis):
    snapshots.put(job_id, 0, 2, 10, b"a snapshot")
    [key] = handoff_redis.keys()
    handoff_redis.expire(key, 5)

    snapshots.put(job_id, 0, 1, 10, b"of the zombie")

    assert handoff_redis.ttl(key) <= 5


def test_every_job_with_snapshots_can_be_listed_and_dropped_and_nothing_else_is_touched(
    snapshots, handoff_redis
):
    kept, dropped, also_dropped = (uuid.uuid4() for _ in range(3))
    for job_id in (kept, dropped, also_dropped):
        snapshots.put(job_id, 0, 1, 10, b"a snapshot")
    handoff_redis.set(f"handoff:{dropped}:0:1", b"pixels")
    assert sorted(snapshots.jobs()) == sorted([kept, dropped, also_dropped])

    snapshots.drop([dropped, also_dropped])
    snapshots.drop([dropped])
    snapshots.drop([])

    assert snapshots.jobs() == [kept]
    assert snapshots.of(dropped) == {}
    assert handoff_redis.exists(f"handoff:{dropped}:0:1")


def test_the_row_of_an_image_says_where_its_snapshot_lies(job_id):
    assert place(job_id, 3) == f"{STORE}:snapshot:{job_id}#3"


def test_snapshots_that_cannot_be_reached_say_so_at_once(job_id):
    away, started = Snapshots(f"redis://127.0.0.1:{a_closed_port()}/0", ttl_s=60), time.monotonic()

    for ask in (
        lambda: away.put(job_id, 0, 1, 10, b"x"),
        lambda: away.of(job_id),
        away.jobs,
        lambda: away.drop([job_id]),
    ):
        with pytest.raises(SnapshotsUnavailable):
            ask()

    assert time.monotonic() - started < 5


def test_a_full_hand_off_keeps_no_snapshot_and_says_so(small_redis, job_id):
    full = Snapshots(small_redis, ttl_s=60)

    with pytest.raises(SnapshotsUnavailable):
        full.put(job_id, 0, 1, 10, b"x" * 100_000)

    assert full.of(job_id) == {}
