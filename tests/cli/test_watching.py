"""How far a job is, as the command line shows it."""

from types import SimpleNamespace

import pytest

from cli.watching import WatchedJob
from darkroom_client import Event


def a_job(*, progress=None, state="running"):
    """As the API tells of one of two images, of 20 steps each that a picture spares 15 of."""
    return SimpleNamespace(state=state, steps=20, n=2, progress=progress, queue=None)


def progress(step):
    return SimpleNamespace(step=step, num_steps=10, images_done=0)


def test_a_job_s_bar_is_as_long_as_the_steps_that_its_images_make():
    watched_job = WatchedJob.of(a_job(progress=progress(4)))

    assert (
        watched_job.done,
        watched_job.steps_to_do,
        watched_job.words.partition(" \u00b7")[0],
    ) == (4, 10, "step 4/10")


def test_a_job_s_bar_learns_its_length_from_the_first_step_that_is_heard():
    watched_job = WatchedJob.of(a_job(state="queued"))

    watched_job.hear(Event(None, "step", {"index": 1, "step": 2, "num_steps": 5}))

    assert (watched_job.done, watched_job.steps_to_do) == (2, 10)
    watched_job.hear(Event(None, "stored", {"index": 1}))
    assert watched_job.done == 5


def test_a_job_s_bar_stays_as_long_as_it_was_for_a_gateway_that_tells_no_number():
    watched_job = WatchedJob.of(a_job(progress=progress(4)))

    watched_job.hear(Event(None, "step", {"index": 0, "step": 5}))

    assert watched_job.steps_to_do == 10


def test_a_job_that_succeeded_has_a_full_bar():
    watched_job = WatchedJob.of(a_job(progress=progress(10), state="succeeded"))

    assert watched_job.done == watched_job.steps_to_do == pytest.approx(10)
