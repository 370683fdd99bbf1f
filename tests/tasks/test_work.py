"""A job's images in the engine: what is known of them, when they stop, what is on record."""

from contextlib import contextmanager

import pytest

from engine.errors import ImageCanceled
from engine.events import Failed, Finished
from tasks.work import ImageEnding, Work
from tests.builders import until

LONG = {"tier": "quality", "determinism": "reproducible", "bucket_rows": 8, "num_steps": 60}


@contextmanager
def work_on(here, **params):
    """A leased job's work, and a way to put one of its images into the engine."""
    with here.keeper.leased(here.accept(**params).id) as held:
        work = Work(held)

        def submit(index: int) -> None:
            def on_event(event):
                if isinstance(event, Finished | Failed):
                    work.put(ImageEnding(index, event))

            request = here.renderer._request(held.lease, index, {})
            work.add(index, here.engine.submit(request, on_event), first_step=0)

        try:
            yield work, submit
        finally:
            work.drop()


def test_work_expects_nothing_until_every_pending_image_is_in_the_engine(here):
    with work_on(here, num_images=2, **LONG) as (work, submit):
        assert work.held.expected_s() is None
        submit(0)
        until(lambda: work.handles[0].progress().step > 1, what="two steps")
        assert work.held.expected_s() is None

        submit(1)

        assert until(work.held.expected_s, what="an estimate") > 0


def test_work_tells_of_no_steps_until_it_is_begun(here):
    with work_on(here, **LONG) as (work, submit):
        submit(0)
        until(lambda: work.handles[0].progress().step > 1, what="two steps")
        assert work.held.steps() == {}

        work.begin()

        assert work.held.steps()[0] > 1


def test_lost_lease_stops_the_images_whatever_the_task_is_busy_with(here):
    with work_on(here, **LONG) as (work, submit):
        submit(0)

        work.held.lose()

        until(work.handles[0].done, what="the end of the image")
        with pytest.raises(ImageCanceled):
            work.handles[0].result()


def test_leaving_worker_wakes_the_task_and_stops_no_image(here):
    with work_on(here, **LONG) as (work, submit):
        submit(0)

        work.held.leave("a test wants it")

        assert work.wait() is None
        assert work.held.is_released
        assert not work.handles[0].done()


def test_dropped_work_has_left_the_engine(here):
    with work_on(here, num_images=2, **LONG) as (work, submit):
        submit(0)
        submit(1)

        work.drop()

        assert [handle.done() for handle in work.handles.values()] == [True, True]


def test_image_that_is_handed_on_is_accounted_for_and_no_longer_in_hand(here):
    with work_on(here, num_images=2) as (work, submit):
        submit(0)
        submit(1)
        assert here.keeper.images_in_hand({}) == {"fast": 2}

        work.note_handed_on(1)
        assert here.keeper.images_in_hand({}) == {"fast": 1}
        assert work.unaccounted().keys() == {0}

        work.note_snapshot_left(0)
        assert here.keeper.images_in_hand({}) == {"fast": 1}
        assert work.unaccounted() == {}


def test_images_that_are_finished_come_with_their_index(here):
    with work_on(here, num_images=2) as (work, submit):
        submit(1)
        until(work.handles[1].done)

        [(index, finished)] = work.drain_finished()

        assert index == 1
        assert finished.request.seed == work.lease.job.seed + 1
