"""Decoded pixels on their way to storage: what was put comes back, or is known to be gone."""

import time
import uuid
from types import SimpleNamespace

import numpy as np
import pytest
import redis

from benchmarks.lib.refusals import REPLIES
from edges.handoff import Gauge, Handoff, HandoffCorrupt, HandoffUnavailable, pixels_sha256
from tests.builders import a_closed_port, a_redis, some_pixels


@pytest.fixture
def handoff(settings, handoff_redis) -> Handoff:
    return Handoff(settings.handoff_url, ttl_s=60)


def test_pixels_come_back_as_they_were_put(handoff):
    job_id, pixels = uuid.uuid4(), some_pixels(width_px=24, height_px=16)

    digest = handoff.put(job_id, 0, 1, pixels)

    back = handoff.get(job_id, 0, 1)
    assert np.array_equal(back.array, pixels)
    assert back.sha256 == digest == pixels_sha256(pixels)


def test_pixels_that_are_not_contiguous_come_back_the_same(handoff):
    job_id, pixels = uuid.uuid4(), some_pixels()[::2, ::-1]

    handoff.put(job_id, 0, 1, pixels)

    assert np.array_equal(handoff.get(job_id, 0, 1).array, pixels)


def test_job_image_and_attempt_each_have_their_own_pixels(handoff):
    job_id = uuid.uuid4()

    handoff.put(job_id, 0, 1, some_pixels(seed=1))
    handoff.put(job_id, 0, 2, some_pixels(seed=2))
    handoff.put(job_id, 1, 1, some_pixels(seed=3))

    assert np.array_equal(handoff.get(job_id, 0, 1).array, some_pixels(seed=1))
    assert np.array_equal(handoff.get(job_id, 0, 2).array, some_pixels(seed=2))
    assert np.array_equal(handoff.get(job_id, 1, 1).array, some_pixels(seed=3))


def test_pixels_that_are_not_there_are_none(handoff):
    assert handoff.get(uuid.uuid4(), 0, 1) is None
    assert not handoff.holds(uuid.uuid4(), 0, 1)


def test_dropped_pixels_are_gone_and_dropping_again_is_harmless(handoff):
    job_id = uuid.uuid4()
    handoff.put(job_id, 0, 1, some_pixels())
    assert handoff.holds(job_id, 0, 1)

    handoff.drop(job_id, 0, 1)
    handoff.drop(job_id, 0, 1)

    assert handoff.get(job_id, 0, 1) is None


def test_nothing_stays_for_ever(handoff, handoff_redis):
    handoff.put(uuid.uuid4(), 0, 1, some_pixels())

    [key] = handoff_redis.keys()
    assert 50 < handoff_redis.ttl(key) <= 60


@pytest.mark.parametrize(
    "spoil",
    [
        lambda blob: blob[:-1] + bytes([blob[-1] ^ 1]),
        lambda blob: blob[:-5],
        lambda blob: blob + b"more",
        lambda blob: blob[:3],
        lambda blob: b"\xff\xff\xff\xff" + blob[4:],
        lambda blob: b"",
        lambda blob: blob.replace(b'"sha256"', b'"sha255"'),
        lambda blob: blob.replace(b"[16, 24, 3]", b"[24, 16, 3]"),
        lambda blob: blob.replace(b"[16, 24, 3]", b"[1152]     "),
        lambda blob: b"\x00\x00\x00\x02[]" + blob,
    ],
    ids=[
        "a bit flipped",
        "cut",
        "longer",
        "stump",
        "no head",
        "empty",
        "no digest",
        "turned",
        "flat",
        "another head",
    ],
)
def test_spoiled_pixels_are_recognised(handoff, handoff_redis, spoil):
    job_id = uuid.uuid4()
    handoff.put(job_id, 0, 1, some_pixels(width_px=24, height_px=16))
    [key] = handoff_redis.keys()
    handoff_redis.set(key, spoil(handoff_redis.get(key)))

    with pytest.raises(HandoffCorrupt):
        handoff.get(job_id, 0, 1)


def test_the_same_bytes_in_another_shape_are_another_image():
    assert pixels_sha256(some_pixels(16, 24)) != pixels_sha256(
        some_pixels(16, 24).reshape(16, 24, 3)
    )


def test_a_hand_off_that_is_away_says_so():
    away = Handoff(f"redis://127.0.0.1:{a_closed_port()}/0", ttl_s=60)

    for ask in (
        lambda: away.put(uuid.uuid4(), 0, 1, some_pixels()),
        lambda: away.get(uuid.uuid4(), 0, 1),
        lambda: away.holds(uuid.uuid4(), 0, 1),
        lambda: list(away.kept()),
        lambda: away.forget(["handoff:x"]),
        away.check,
    ):
        with pytest.raises(HandoffUnavailable):
            ask()
    away.drop(uuid.uuid4(), 0, 1)  # the TTL does it


def test_everything_that_is_kept_can_be_told_apart(handoff, handoff_redis):
    one, other = uuid.uuid4(), uuid.uuid4()
    images = {(one, 0, 1), (one, 0, 12), (one, 3, 1), (other, 0, 1)}
    for job_id, index, attempt in images:
        handoff.put(job_id, index, attempt, some_pixels())
    handoff_redis.set(f"snapshot:{one}", b"of no interest here")

    kept = list(handoff.kept())

    assert {(job_id, index, attempt) for _, job_id, index, attempt in kept} == images
    assert len({key for key, *_ in kept}) == 4


def test_pixels_that_nobody_waits_for_are_forgotten_by_their_key(handoff):
    orphan, awaited = uuid.uuid4(), uuid.uuid4()
    for job_id in (orphan, awaited):
        handoff.put(job_id, 0, 1, some_pixels())

    keys = [key for key, job_id, _, _ in handoff.kept() if job_id == orphan]
    handoff.forget(keys)
    handoff.forget(keys)
    handoff.forget([])

    assert (handoff.holds(orphan, 0, 1), handoff.holds(awaited, 0, 1)) == (False, True)


def test_a_key_that_is_none_of_ours_is_an_error_and_not_an_orphan(handoff, handoff_redis):
    handoff_redis.set("handoff:strange", b"")

    with pytest.raises(HandoffUnavailable):
        list(handoff.kept())


def test_a_full_hand_off_says_so(small_redis):
    with pytest.raises(HandoffUnavailable):
        Handoff(small_redis, ttl_s=60).put(uuid.uuid4(), 0, 1, some_pixels(256, 256))


def test_every_error_that_a_hand_off_answers_with_is_one_kind_and_passes(
    settings, handoff_redis, proxied
):
    proxy, url = proxied(settings.handoff_url)
    handoff, job_id = Handoff(url, ttl_s=60), uuid.uuid4()
    handoff.put(job_id, 0, 1, some_pixels())
    asks = {
        "put": lambda: handoff.put(job_id, 1, 1, some_pixels()),
        "get": lambda: handoff.get(job_id, 0, 1),
        "holds": lambda: handoff.holds(job_id, 0, 1),
        "kept": lambda: list(handoff.kept()),
        "forget": lambda: handoff.forget(["handoff:x:0:1"]),
        "check": handoff.check,
    }

    for reply in REPLIES.values():
        with proxy.refusing(reply):
            for ask in asks.values():
                with pytest.raises(HandoffUnavailable):
                    ask()

    assert handoff.holds(job_id, 0, 1)


def test_a_hand_off_that_was_demoted_is_left_for_the_one_that_took_over_and_no_write_fails(
    proxied, tmp_path
):
    with a_redis(tmp_path) as url_before, a_redis(tmp_path) as successor:
        proxy, url = proxied(url_before)
        handoff, job_id = Handoff(url, ttl_s=60), uuid.uuid4()
        handoff.put(job_id, 0, 1, some_pixels())

        redis.Redis.from_url(url_before).execute_command("REPLICAOF", "127.0.0.1", "1")
        proxy.lead_to(successor)
        handoff.put(job_id, 1, 1, some_pixels())

        assert redis.Redis.from_url(successor).dbsize() == 1


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The gauge's clock, which a test turns on."""
    clock = [time.monotonic()]
    monkeypatch.setattr("edges.handoff.time", SimpleNamespace(monotonic=lambda: clock[0]))
    return clock


def test_one_that_takes_nothing_counts_as_full_for_whoever_trusts_its_last_answer_only_so_long(
    settings, handoff_redis, proxied, clock
):
    proxy, url = proxied(settings.handoff_url)
    gauge = Gauge(url, trusted_for_s=2.0)
    assert gauge.fill() < 0.9

    proxy.refuse(REPLIES["READONLY"])
    clock[0] += 1.9
    assert gauge.fill() < 0.9
    clock[0] += 1.1
    assert gauge.fill() == 1.0

    proxy.relent()
    clock[0] += 1.1
    assert gauge.fill() < 0.9


def test_how_full_the_hand_off_is_is_the_memory_in_use_of_what_may_be_used(
    settings, handoff_redis, small_redis
):
    memory = handoff_redis.info("memory")

    assert Gauge(settings.handoff_url).fill() == pytest.approx(
        memory["used_memory"] / memory["maxmemory"], rel=0.2
    )
    assert Gauge(small_redis).fill() > 0.9


def test_a_hand_off_without_a_limit_is_never_full(tmp_path):
    with a_redis(tmp_path) as url:
        assert Gauge(url).fill() == 0


def test_the_gauge_is_read_once_a_second_and_holds_its_last_answer_while_nobody_answers(
    tmp_path, clock
):
    with a_redis(tmp_path, maxmemory="100mb") as url:
        gauge, redis_there = Gauge(url), redis.Redis.from_url(url)
        before = gauge.fill()
        redis_there.set("something", b"x" * 50_000_000)

        assert gauge.fill() == before
        clock[0] += 1.1
        after = gauge.fill()
        assert after > before + 0.4

    clock[0] += 1.1
    assert gauge.fill() == after


def test_before_its_first_answer_the_gauge_says_empty():
    assert Gauge(f"redis://127.0.0.1:{a_closed_port()}/0").fill() == 0
