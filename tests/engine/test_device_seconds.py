"""Seconds of a device that is behind: a GPU's forwards are booked when it has passed them."""

from engine_builders import an_image, ids

from engine.ledger import Ledger
from engine.scheduler import Batch, Decode, Encode


class Watch:
    """A stopped stopwatch of a GPU, which passes its end when told to."""

    def __init__(self, seconds: float, is_ready: bool = False) -> None:
        self.is_ready = is_ready
        self._seconds = seconds

    def stop(self) -> None:
        pass

    def seconds(self) -> float:
        """Wait for the device."""
        self.is_ready = True
        return self._seconds


def a_ledger():
    """(ledger, charged): the pieces of work it had charged, in their order."""
    charged = []
    return Ledger(lambda work, seconds: charged.append((work, seconds))), charged


def launched(ledger, *ids: str) -> tuple[list[Batch], list[Watch]]:
    """Forwards of one image each that a GPU has yet to do."""
    batches, watches = [Batch.alone(an_image(id)) for id in ids], [Watch(1.0) for _ in ids]
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
    ledger.enter_encode(encode, Watch(0.5, is_ready=True))

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

    ledger.book_decode(Decode(image), 0.25)

    assert (image.account.denoise_s, image.account.decode_s) == (1.0, 0.25)
    assert [seconds for _, seconds in charged] == [1.0, 0.25]
    assert ledger.seconds_by_rank == {0: 1.25}
