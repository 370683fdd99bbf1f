"""How far a job is, as the command line shows it."""

from types import SimpleNamespace

import pytest

from cli.watching import Sight
from darkroom_client import Event


def a_job(*, progress=None, state="running"):
    """As the API tells of one of two images, of 20 steps each that a picture spares 15 of."""
    return SimpleNamespace(state=state, steps=20, n=2, progress=progress, queue=None)


def progress(step):
    return SimpleNamespace(step=step, num_steps=10, images_done=0)


def test_a_job_s_bar_is_as_long_as_the_steps_that_its_images_make():
    sight = Sight.of(a_job(progress=progress(4)))

    assert (sight.done, sight.steps_to_do, sight.words.partition(" \u00b7")[0]) == (
        4,
        10,
        "step 4/10",
    )


def test_a_job_s_bar_learns_its_length_from_the_first_step_that_is_heard():
    sight = Sight.of(a_job(state="queued"))

    sight.hear(Event(None, "step", {"index": 1, "step": 2, "num_steps": 5}))

    assert (sight.done, sight.steps_to_do) == (2, 10)
    sight.hear(Event(None, "stored", {"index": 1}))
    assert sight.done == 5


def test_a_job_s_bar_stays_as_long_as_it_was_for_a_gateway_that_tells_no_number():
    sight = Sight.of(a_job(progress=progress(4)))

    sight.hear(Event(None, "step", {"index": 0, "step": 5}))

    assert sight.steps_to_do == 10


def test_a_job_that_succeeded_has_a_full_bar():
    sight = Sight.of(a_job(progress=progress(10), state="succeeded"))

    assert sight.done == sight.steps_to_do == pytest.approx(10)
