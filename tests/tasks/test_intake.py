"""What a worker counts as in its hand.

Images of messages until their lease is known, of leases as long as they are to be rendered.
"""

import uuid

import pytest

from fleet.consumer import TakenTask
from models.database import transaction
from policy import queues
from tasks.roles.render import images_by_job
from tests.builders import a_fleet, a_job, until


def a_batch_job(here, num_images):
    with transaction(here.database) as session:
        return a_job(session, tier="batch", num_images=num_images)


def test_a_message_counts_by_what_it_says_until_its_lease_tells_better(here):
    job = a_batch_job(here, num_images=2)
    message = {job.id: ("batch", 8)}

    assert here.keeper.images_in_hand(message) == {"batch": 8}
    with here.keeper.leased(job.id):
        assert here.keeper.images_in_hand(message) == {"batch": 2}


def test_a_task_whose_lease_has_ended_counts_nothing_while_it_clears_up(here):
    job = a_batch_job(here, num_images=2)
    with here.keeper.leased(job.id):
        pass

    assert here.keeper.images_in_hand({job.id: ("batch", 2)}) == {}
    here.keeper.end_task(job.id)
    assert here.keeper.images_in_hand({job.id: ("batch", 2)}) == {"batch": 2}, (
        "another message of the job"
    )


def test_a_task_that_was_refused_the_lease_counts_nothing(here):
    nobody_s = uuid.uuid4()
    with here.keeper.leased(nobody_s) as held:
        assert held is None

    assert here.keeper.images_in_hand({nobody_s: ("fast", 4)}) == {}


def test_a_second_message_of_a_job_in_hand_counts_nothing(here):
    job = a_batch_job(here, num_images=3)

    with here.keeper.leased(job.id), here.keeper.leased(job.id) as second:
        assert second is None
        here.keeper.end_task(job.id)
        assert here.keeper.images_in_hand({job.id: ("batch", 3)}) == {"batch": 3}


def test_a_rendered_job_leaves_nothing_behind(here):
    job = a_batch_job(here, num_images=2)

    here.render(job).join(timeout=60)

    until(lambda: here.keeper.images_in_hand({}) == {})
    assert here.keeper.images_in_hand({job.id: ("batch", 2)}) == {"batch": 2}


@pytest.mark.parametrize(
    ("headers", "images"),
    [
        ({queues.NUM_IMAGES: 3}, 3),
        ({}, 8),
        ({queues.NUM_IMAGES: "3"}, 8),
        ({queues.NUM_IMAGES: 0}, 8),
    ],
)
def test_a_message_that_does_not_say_how_large_it_is_counts_as_the_largest_of_its_tier(
    headers, images
):
    job_id = uuid.uuid4()

    assert images_by_job(
        a_fleet(), [TakenTask("local.batch.front", {"job_id": str(job_id)}, headers)]
    ) == {job_id: ("batch", images)}


@pytest.mark.parametrize("kwargs", [{}, {"job_id": "not an id"}, {"job_id": None}])
def test_a_message_that_is_none_of_ours_counts_nothing(kwargs):
    assert images_by_job(a_fleet(), [TakenTask("local.fast", kwargs, {})]) == {}
