"""A job's images in the engine: what is known of them, when they stop, what is on record."""

import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from engine.errors import ImageCanceled
from engine.events import Failed, Finished
from models.database import transaction
from models.leases import Lease
from tasks.held import HeldLease
from tasks.work import ImageEnding, RenderWork
from tests.builders import a_lease, until

LONG = {"tier": "quality", "determinism": "reproducible", "bucket_rows": 8, "num_steps": 60}


@contextmanager
def work_on(here, **params):
    """A leased job's work, and a way to put one of its images into the engine."""
    with here.keeper.leased(here.accept(**params).id) as held:
        work = RenderWork(held)

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


def test_work_expects_nothing_while_one_of_its_images_has_not_begun(here):
    def an_image(eta_s: float | None) -> SimpleNamespace:
        progress = SimpleNamespace(eta_s=eta_s)
        return SimpleNamespace(progress=lambda: progress, done=lambda: False)

    with here.keeper.leased(here.accept(num_images=2).id) as held:
        work = RenderWork(held)
        work.add(0, an_image(eta_s=0.5), first_step=0)
        work.add(1, an_image(eta_s=None), first_step=0)
        assert held.expected_s() is None

        work.add(1, an_image(eta_s=0.7), first_step=0)

        assert held.expected_s() == 0.7


def test_time_left_to_run_shrinks_while_the_job_is_held_and_is_never_below_zero(here):
    lease = next_lease(here, run_within_s=0.4)
    held = HeldLease(lease)
    assert 0.2 < held.run_left_s <= 0.4

    time.sleep(0.2)
    assert 0 <= held.run_left_s <= 0.2
    time.sleep(0.3)

    assert held.run_left_s == 0.0


def test_job_without_a_run_deadline_has_no_time_that_is_left(here):
    assert HeldLease(next_lease(here)).run_left_s is None


def next_lease(here, **params) -> Lease:
    with transaction(here.database) as session:
        return a_lease(session, **params)
