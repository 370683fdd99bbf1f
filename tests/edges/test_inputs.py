"""Pictures on their way to a GPU.

What was brought is there, all of it at once, and nothing stays for ever.
"""

import uuid

import numpy as np
import pytest

from edges.handoff import HandoffUnavailable
from edges.inputs import Inputs, PictureGone
from tests.builders import a_closed_port, some_pixels


@pytest.fixture
def inputs(settings, handoff_redis) -> Inputs:
    return Inputs(settings.handoff_url, ttl_s=60)


def test_pictures_come_back_by_their_role(inputs):
    job_id, mask = uuid.uuid4(), some_pixels()[:, :, 0]

    inputs.bring(
        job_id,
        {
            "init_image": some_pixels(seed=1),
            "mask": mask,
            "control_image": PictureGone("control_image: file x was erased"),
        },
    )

    brought = inputs.of(job_id)
    assert inputs.are_there(job_id)
    assert np.array_equal(brought["init_image"], some_pixels(seed=1))
    assert np.array_equal(brought["mask"], mask)
    assert brought["control_image"] == PictureGone("control_image: file x was erased")
    assert inputs.jobs() == [job_id]


def test_nothing_was_brought_for_another_job(inputs):
    inputs.bring(uuid.uuid4(), {"init_image": some_pixels()})

    other = uuid.uuid4()
    assert (inputs.of(other), inputs.are_there(other)) == ({}, False)


def test_dropped_pictures_are_gone_and_dropping_again_is_harmless(inputs):
    job_id = uuid.uuid4()
    inputs.bring(job_id, {"init_image": some_pixels()})

    inputs.drop([job_id])
    inputs.drop([job_id])
    inputs.drop([])

    assert inputs.of(job_id) == {}


def test_a_picture_does_not_stay_for_ever(inputs, handoff_redis):
    inputs.bring(uuid.uuid4(), {"init_image": some_pixels()})

    [key] = handoff_redis.keys()
    assert 50 < handoff_redis.ttl(key) <= 60


def test_spoilt_pictures_are_as_good_as_none(inputs, handoff_redis):
    job_id = uuid.uuid4()
    inputs.bring(job_id, {"init_image": some_pixels()})
    [key] = handoff_redis.keys()
    handoff_redis.hset(key, "init_image", b"\x00\x00\x00\x02{}")

    with pytest.raises(HandoffUnavailable):
        inputs.of(job_id)


def test_a_full_hand_off_takes_no_pictures(small_redis):
    with pytest.raises(HandoffUnavailable):
        Inputs(small_redis, ttl_s=60).bring(uuid.uuid4(), {"init_image": some_pixels(256, 256)})


def test_a_hand_off_that_is_away_says_so():
    away = Inputs(f"redis://127.0.0.1:{a_closed_port()}/0", ttl_s=60)

    for ask in (
        lambda: away.bring(uuid.uuid4(), {"init_image": some_pixels()}),
        lambda: away.of(uuid.uuid4()),
        lambda: away.are_there(uuid.uuid4()),
        lambda: away.drop([uuid.uuid4()]),
        away.jobs,
    ):
        with pytest.raises(HandoffUnavailable):
            ask()
