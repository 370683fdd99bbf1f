"""Foreign errors become ours, and nothing else does."""

import traceback
import uuid
from collections.abc import Iterator

import pytest

from edges.errors import wrap
from edges.handoff import Handoff, HandoffUnavailable


class Ours(Exception):
    pass


def test_ours_tells_the_kind_and_the_text_of_theirs_and_keeps_it_as_its_cause():
    theirs = ConnectionError("refused by 127.0.0.1")

    with (
        pytest.raises(Ours, match=r"^ConnectionError: refused by 127\.0\.0\.1$") as raised,
        wrap(OSError, Ours),
    ):
        raise theirs

    assert type(raised.value) is Ours
    assert raised.value.__cause__ is raised.value.__context__ is theirs
    assert raised.value.__suppress_context__


def test_a_function_makes_ours_out_of_theirs():
    secret = ValueError("https://bucket/?signature=secret")

    with (
        pytest.raises(Ours) as raised,
        wrap(ValueError, lambda error: Ours(f"{len(error.args)} told")),
    ):
        raise secret

    assert str(raised.value) == "1 told"
    assert raised.value.__cause__ is secret


@pytest.mark.parametrize("kinds", [(ValueError, OSError), (OSError, ValueError)])
@pytest.mark.parametrize("theirs", [ValueError("spoilt"), TimeoutError("silent")])
def test_of_several_kinds_each_becomes_ours(kinds, theirs):
    with pytest.raises(Ours) as raised, wrap(kinds, Ours):
        raise theirs

    assert str(raised.value) == f"{type(theirs).__name__}: {theirs}"


@pytest.mark.parametrize(
    "other",
    [
        KeyError("other"),
        Ours("ours already"),
        KeyboardInterrupt(),
        StopIteration(),
        GeneratorExit(),
    ],
)
def test_any_other_error_passes_as_it_is(other):
    with pytest.raises(type(other)) as raised, wrap((OSError, ValueError), Ours):
        raise other

    assert raised.value is other
    assert raised.value.__cause__ is None


def test_a_block_without_an_error_gives_what_it_returns():
    def answer() -> int:
        with wrap(OSError, Ours):
            return 42

    assert answer() == 42


def test_the_place_of_their_error_is_in_the_traceback():
    def misplaced() -> None:
        raise OSError("here")

    with pytest.raises(Ours) as raised, wrap(OSError, Ours):
        misplaced()

    assert traceback.extract_tb(raised.value.__cause__.__traceback__)[-1].name == "misplaced"


def test_one_may_be_entered_again_while_it_is_open():
    shared = wrap(OSError, Ours)

    with pytest.raises(Ours, match="OSError: inner"), shared, shared:
        raise OSError("inner")


def numbers(last: Exception | None = None) -> Iterator[int]:
    with wrap(ValueError, Ours):
        yield 1
        if last is not None:
            raise last
        yield 2


def fail_at_the_first_of(things: Iterator[object]) -> None:
    for _ in things:
        raise ValueError("his")


def test_a_generator_s_own_error_becomes_ours():
    with pytest.raises(Ours, match="ValueError: within"):
        list(numbers(last=ValueError("within")))


def test_an_error_of_whoever_consumes_a_generator_stays_his():
    with pytest.raises(ValueError, match="his"):
        fail_at_the_first_of(numbers())


def test_a_generator_that_is_left_early_is_closed_without_an_error():
    left = numbers()
    next(left)

    left.close()

    assert list(left) == []


def test_an_error_of_whoever_reads_what_the_hand_off_keeps_stays_his(settings, handoff_redis):
    handoff = Handoff(settings.handoff_url, ttl_s=60)
    handoff_redis.set(f"handoff:{uuid.uuid4()}:0:1", b"")

    with pytest.raises(ValueError, match="his"):
        fail_at_the_first_of(handoff.kept())

    handoff_redis.set("handoff:what:is:this", b"")
    with pytest.raises(HandoffUnavailable, match="ValueError: "):
        list(handoff.kept())
