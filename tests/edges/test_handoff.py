"""Decoded pixels on their way to storage: what was put comes back, or is known to be gone."""

import uuid

import numpy as np
import pytest

from edges.handoff import Handoff, HandoffCorrupt, HandoffUnavailable, pixels_sha256
from tests.builders import a_closed_port, some_pixels


@pytest.fixture
def handoff(settings, handoff_redis) -> Handoff:
    return Handoff(settings.handoff_url, ttl_s=60)


def test_what_was_put_comes_back(handoff):
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


def test_what_is_not_there_is_none(handoff):
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
    ids=["a bit flipped", "cut", "longer", "stump", "no head", "empty", "no digest", "turned", "flat", "another head"],
)
def test_spoiled_pixels_are_recognised(handoff, handoff_redis, spoil):
    job_id = uuid.uuid4()
    handoff.put(job_id, 0, 1, some_pixels(width_px=24, height_px=16))
    [key] = handoff_redis.keys()
    handoff_redis.set(key, spoil(handoff_redis.get(key)))

    with pytest.raises(HandoffCorrupt):
        handoff.get(job_id, 0, 1)


def test_the_same_bytes_in_another_shape_are_another_image():
    assert pixels_sha256(some_pixels(16, 24)) != pixels_sha256(some_pixels(16, 24).reshape(16, 24, 3))


def test_a_hand_off_that_is_away_says_so():
    away = Handoff(f"redis://127.0.0.1:{a_closed_port()}/0", ttl_s=60)

    for ask in (
        lambda: away.put(uuid.uuid4(), 0, 1, some_pixels()),
        lambda: away.get(uuid.uuid4(), 0, 1),
        lambda: away.holds(uuid.uuid4(), 0, 1),
        away.ping,
    ):
        with pytest.raises(HandoffUnavailable):
            ask()
    away.drop(uuid.uuid4(), 0, 1)  # the TTL does it
