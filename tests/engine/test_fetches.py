"""What is fetched from the device is worked on beside the device thread, in its order."""

import threading
from functools import partial

import torch

from engine.fetches import Fetched, Fetches


class Watch:
    """A stopped stopwatch of a device that is behind."""

    def __init__(self) -> None:
        self.passed = threading.Event()

    def wait(self) -> None:
        assert self.passed.wait(10)


def fetched(*, is_there: bool = True) -> Fetched:
    watch = Watch()
    if is_there:
        watch.passed.set()
    return Fetched(torch.zeros(1), watch)


def test_what_is_fetched_is_worked_on_once_the_device_has_passed_it():
    fetches, done = Fetches(), []
    late = fetched(is_there=False)
    fetches.add("a", late, done.append)
    assert done == []

    late.watch.passed.set()
    fetches.finish("a")

    assert [tensor is late.tensor for tensor in done] == [True]
    fetches.close()


def test_everybody_s_fetches_are_worked_on_in_their_order():
    fetches, done = Fetches(), []
    for place, image_id in enumerate("abab"):
        fetches.add(image_id, fetched(), lambda _, place=place: done.append(place))

    fetches.finish("b")

    assert done == [0, 1, 2, 3]
    fetches.close()


def test_an_image_without_fetches_or_forgotten_is_not_waited_for():
    fetches = Fetches()
    never = fetched(is_there=False)
    fetches.add("a", never, lambda _: None)

    fetches.finish("b")
    fetches.forget("a")
    fetches.finish("a")

    never.watch.passed.set()
    fetches.close()


def test_work_that_fails_keeps_no_other_from_being_done(caplog):
    fetches, done = Fetches(), []
    fetches.add("a", fetched(), partial(int, "no number"))
    fetches.add("a", fetched(), done.append)

    fetches.finish("a")

    assert len(done) == 1
    assert "fetch_failed" in caplog.messages
    fetches.close()
