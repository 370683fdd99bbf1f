"""Seconds of a device that is behind: a GPU's forwards are booked when it has passed them.

One that decodes beside its forwards is charged once for each second.
"""

from itertools import accumulate, pairwise

import pytest
from engine_builders import an_image, ids
from hypothesis import given
from hypothesis import strategies as st

from engine import device
from engine.device import Device, Span
from engine.ledger import KEPT_SPANS, Ledger
from engine.scheduler import Batch, Decode, Encode


class Watch:
    """A stopped stopwatch of a GPU, which passes its end when told to."""

    def __init__(self, span: Span, is_ready: bool = False) -> None:
        self.is_ready = is_ready
        self._span = span

    def stop(self) -> None:
        pass

    def span(self) -> Span:
        """Wait for the device."""
        self.is_ready = True
        return self._span


def a_ledger():
    """(ledger, charged): the pieces of work it had charged, in their order."""
    charged = []
    return Ledger(lambda work, seconds, _: charged.append((work, seconds))), charged


def launched(ledger, *ids: str) -> tuple[list[Batch], list[Watch]]:
    """Forwards of one image each that a GPU has yet to do."""
    batches = [Batch.alone(an_image(id)) for id in ids]
    watches = [Watch(Span(place, place + 1.0)) for place, _ in enumerate(ids)]
    for batch, watch in zip(batches, watches, strict=True):
        ledger.enter_forward(batch, watch)
    return batches, watches


def test_booking_waits_for_no_more_forwards_than_are_too_many():
    ledger, charged = a_ledger()
    _, watches = launched(ledger, "a", "b", "c")

    ledger.book(1)

    # the GPU is fed by the last
    assert [watch.is_ready for watch in watches] == [True, True, False]
    assert [ids(work) for work, _ in charged] == [["a"], ["b"]]
    assert ledger.forward_s == 2.0


def test_booking_waits_for_nothing_while_the_device_is_near_enough():
    ledger, charged = a_ledger()
    _, watches = launched(ledger, "a")

    ledger.book(1)

    assert not watches[0].is_ready
    assert charged == []


def test_booking_takes_the_device_s_order_and_counts_no_encode_as_a_forward_ahead():
    ledger, charged = a_ledger()
    encode = Encode(an_image("b", encoded=False))
    (a,), (watch,) = launched(ledger, "a")
    ledger.enter_encode(encode, Watch(Span(1.0, 1.5), is_ready=True))

    ledger.book(1)
    assert charged == []  # the encode is over only after the forward before it
    watch.is_ready = True
    ledger.book(1)

    assert charged == [(a, 1.0), (encode, 0.5)]
    assert (ledger.forward_s, ledger.encode_s) == (1.0, 0.5)


def test_booking_a_decode_books_the_forwards_before_it_so_that_the_account_is_whole():
    ledger, charged = a_ledger()
    (batch,), (watch,) = launched(ledger, "a")
    [image] = batch
    ledger.book(1)
    watch.is_ready = True

    ledger.book_decode(Decode(image), Span(1.0, 1.25))

    assert (image.account.denoise_s, image.account.decode_s) == (1.0, 0.25)
    assert [seconds for _, seconds in charged] == [1.0, 0.25]
    assert ledger.seconds_by_rank == {0: 1.25}


def test_a_second_of_a_decode_beside_forwards_is_charged_to_those():
    ledger, charged = a_ledger()
    batches, watches = launched(ledger, "a", "b")
    for watch in watches:
        watch.is_ready = True
    decode = Decode(an_image("c"))

    ledger.book_decode(decode, Span(1.75, 2.5))

    assert charged == [(batches[0], 1.0), (batches[1], 1.0), (decode, 0.5)]
    assert (ledger.forward_s, ledger.decode_s) == (2.0, 0.5)


def test_a_forward_that_is_over_after_a_decode_is_charged_for_what_is_left():
    ledger, charged = a_ledger()
    (batch,), (watch,) = launched(ledger, "a")
    decode = Decode(an_image("c"))
    ledger.book_decode(decode, Span(0.25, 0.5))
    watch.is_ready = True

    ledger.book(0)

    assert charged == [(decode, 0.25), (batch, 0.75)]


def test_work_that_had_company_on_the_device_teaches_nothing():
    taught = []
    ledger = Ledger(lambda work, _, was_alone: taught.append(was_alone))
    for span, is_beside in ((Span(0, 1), False), (Span(1, 2), True), (Span(1.5, 2.5), False)):
        watch = Watch(span, is_ready=True)
        ledger.enter_forward(Batch.alone(an_image("a")), watch, is_beside_decode=is_beside)
    ledger.book(0)
    ledger.book_decode(Decode(an_image("b")), Span(2.0, 3.0))

    assert taught == [True, False, False, False]


seconds = st.integers(0, 100).map(lambda hundredths: hundredths / 64)


@given(
    forwards=st.lists(st.tuples(seconds, seconds), max_size=20),
    decodes=st.lists(st.tuples(seconds, seconds), max_size=10),
    order=st.randoms(use_true_random=False),
)
def test_charges_add_up_to_the_time_in_which_the_device_was_busy(forwards, decodes, order):
    ledger, charged = a_ledger()
    work = [(Batch.alone(an_image("f")), span) for span in one_after_another(forwards)]
    work += [(Decode(an_image("d")), span) for span in one_after_another(decodes)]
    order.shuffle(work)  # in whatever order they are found to be over

    for piece, span in work:
        if isinstance(piece, Decode):
            ledger.book_decode(piece, span)
        else:
            ledger.enter_forward(piece, Watch(span, is_ready=True))
            ledger.book(0)

    assert sum(paid for _, paid in charged) == busy_s([span for _, span in work])
    assert ledger.forward_s + ledger.decode_s == busy_s([span for _, span in work])


def one_after_another(pauses_and_lengths: list[tuple[float, float]]) -> list[Span]:
    """Lay spans behind one another, as a stream of the device has them."""
    times = list(accumulate(part for pair in pauses_and_lengths for part in pair))
    return [Span(start, end) for start, end in zip(times[::2], times[1::2], strict=True)]


def busy_s(spans: list[Span]) -> float:
    """Count the seconds that are in any of the spans."""
    busy, until = 0.0, 0.0
    for span in sorted(spans, key=lambda one: one.start_s):
        busy += max(0.0, span.end_s - max(until, span.start_s))
        until = max(until, span.end_s)
    return busy


def test_charged_time_of_long_ago_is_forgotten():
    ledger, _ = a_ledger()
    for place in range(3 * KEPT_SPANS):
        ledger.book_decode(Decode(an_image("a")), Span(2.0 * place, 2.0 * place + 1))

    assert len(ledger._charged._spans) == KEPT_SPANS


class FakeCuda:
    """Streams and events of a device whose time is told by the test."""

    def __init__(self) -> None:
        self.now_s = 1_000.0
        fake = self

        class Event:
            def __init__(self, **_) -> None:
                self.at_s = 0.0

            def record(self) -> None:
                self.at_s = fake.now_s

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, other: "Event") -> float:
                assert abs(other.at_s - self.at_s) < 2 * device.CLOCK_S, "it would be inexact"
                return (other.at_s - self.at_s) * 1000

        self.Event = Event


def test_spans_of_a_gpu_are_told_by_one_clock_however_long_it_runs(monkeypatch):
    cuda = FakeCuda()
    monkeypatch.setattr(device, "cuda", cuda)
    monkeypatch.setattr(device.time, "monotonic", lambda: cuda.now_s)
    gpu = Device("cuda:0", num_threads=1)
    spans = []

    for _ in range(40):
        watch = gpu.stopwatch()
        cuda.now_s += 0.25
        watch.stop()
        cuda.now_s += 13.0
        spans.append(watch.span())

    assert [span.seconds for span in spans] == pytest.approx([0.25] * 40)
    starts = [span.start_s for span in spans]
    assert [late - early for early, late in pairwise(starts)] == pytest.approx([13.25] * 39)
