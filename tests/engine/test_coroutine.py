"""A function in a thread of its own that asks, and an owner that answers, cancels or loses interest
at any moment.
"""

import random
import threading
from contextlib import contextmanager

import pytest

from engine.families.coroutine import Closed, Coroutine, Returned


def ask_thrice(ask):
    return [ask("first"), ask("second"), ask("third")]


@pytest.fixture(autouse=True)
def no_thread_is_left_behind():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def test_every_answer_arrives_where_its_question_was_asked():
    coroutine = Coroutine(ask_thrice)

    asked = [coroutine.resume(answer) for answer in (None, 1, 2)]

    assert asked == ["first", "second", "third"]
    assert coroutine.resume(3) == Returned([1, 2, 3])
    assert coroutine.is_over


def test_nothing_runs_before_the_first_resume():
    ran = []
    coroutine = Coroutine(lambda ask: ran.append(True))

    assert not ran
    coroutine.resume()
    assert ran


def test_only_one_of_the_two_runs_at_a_time():
    trace = []

    def chatter(ask):
        for index in range(50):
            trace.append(f"function {index}")
            ask(index)

    coroutine = Coroutine(chatter)
    for index in range(50):
        coroutine.resume()
        trace.append(f"owner {index}")
    coroutine.close()

    assert trace == [f"{who} {index}" for index in range(50) for who in ("function", "owner")]


def test_an_error_of_the_function_comes_out_of_resume():
    def fail(ask):
        ask("anything")
        raise ValueError("no good")

    coroutine = Coroutine(fail)
    coroutine.resume()

    with pytest.raises(ValueError, match="no good"):
        coroutine.resume()
    assert coroutine.is_over


def test_a_coroutine_that_is_over_cannot_be_resumed():
    coroutine = Coroutine(lambda ask: None)
    coroutine.resume()

    with pytest.raises(RuntimeError, match="over"):
        coroutine.resume()


@pytest.mark.parametrize("resumes", [0, 1, 2, 3, 4])
def test_it_can_be_closed_at_any_moment_and_again(resumes):
    coroutine = Coroutine(ask_thrice)
    for _ in range(resumes):
        coroutine.resume()

    coroutine.close()
    coroutine.close()

    assert coroutine.is_over


def test_a_closed_function_is_unwound():
    trace = []

    def tidy(ask):
        try:
            ask("anything")
        finally:
            trace.append("tidied up")

    coroutine = Coroutine(tidy)
    coroutine.resume()
    coroutine.close()

    assert trace == ["tidied up"]


def test_a_function_that_survives_errors_and_asks_again_is_closed_all_the_same():
    survived = []

    def stubborn(ask):
        try:
            try:
                ask("first")
            except Exception:  # noqa: BLE001  the very thing that is tested
                survived.append("an Exception")
            finally:
                ask("second, while being unwound")
        except Closed:
            ask("third, having caught even that")

    coroutine = Coroutine(stubborn)
    coroutine.resume()
    coroutine.close()

    assert survived == []


def test_an_error_of_a_function_that_is_closed_is_nobody_s_concern():
    def replaces(ask):
        try:
            ask("anything")
        except Closed:
            raise ValueError("instead") from None

    coroutine = Coroutine(replaces)
    coroutine.resume()

    coroutine.close()

    assert coroutine.is_over


def test_the_surroundings_are_entered_in_the_functions_thread_and_left_at_its_end():
    trace = []

    @contextmanager
    def within():
        trace.append(("in", threading.current_thread().name))
        yield
        trace.append(("out", threading.current_thread().name))

    coroutine = Coroutine(lambda ask: ask("anything"), name="of its own", within=within)
    coroutine.resume()
    assert trace == [("in", "of its own")]
    coroutine.resume()

    assert trace == [("in", "of its own"), ("out", "of its own")]


def test_surroundings_that_cannot_be_entered_are_the_owners_problem():
    def within():
        raise OSError("no device")

    coroutine = Coroutine(ask_thrice, within=within)

    with pytest.raises(OSError, match="no device"):
        coroutine.resume()


def test_no_thread_is_left_of_two_hundred_that_were_closed_at_random_moments():
    dice = random.Random(7)
    before = threading.active_count()

    for _ in range(200):
        coroutine = Coroutine(ask_thrice)
        for _ in range(dice.randrange(5)):
            coroutine.resume()
        coroutine.close()

    assert threading.active_count() == before


def test_a_coroutine_that_is_over_or_closed_holds_on_to_nothing():
    import gc
    import weakref

    class Tensor:
        pass

    def holding(tensor):
        def run(ask):
            ask(tensor)

        return run

    kept = []
    gc.disable()  # references alone must let go: a device's memory does not wait for the collector
    try:
        for resumes in (0, 1, 2):
            tensor = Tensor()
            coroutine = Coroutine(holding(tensor))
            for _ in range(resumes):
                coroutine.resume()
            coroutine.close()
            kept.append((coroutine, weakref.ref(tensor)))
            del tensor
        assert [reference() for _, reference in kept] == [None, None, None]
    finally:
        gc.enable()
