"""Account for the device's time: each forward's seconds, shared out to the images in it.

A GPU's seconds are known only after it has passed them, so work is entered when launched and booked
when it is over. It decodes beside its forwards, and a second in which it did both is charged once.
"""

from bisect import insort
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.device import Span, Stopwatch
from engine.scheduler import Batch, Decode, Encode, Work

# Spans that are remembered as charged: more than a device passes while it does one decode.
KEPT_SPANS = 256


@dataclass
class RowTotals:
    """Forwards of one size."""

    forwards: int = 0
    seconds: float = 0.0

    @property
    def mean_s(self) -> float:
        """Return the mean seconds of one forward."""
        return self.seconds / self.forwards if self.forwards else 0.0


class ChargedTime:
    """The device's seconds that somebody was charged for."""

    def __init__(self) -> None:
        self._spans: list[Span] = []  # disjoint, the latest last

    def add(self, span: Span) -> float:
        """Count a span as charged; return the seconds of it that were not until now."""
        free = [span]
        for charged in reversed(self._spans):
            if charged.end_s <= span.start_s:
                break
            free = [part for one in free for part in _without(one, charged)]
        for part in free:
            insort(self._spans, part, key=lambda one: one.start_s)
        del self._spans[:-KEPT_SPANS]
        return sum(part.seconds for part in free)


def _without(span: Span, charged: Span) -> list[Span]:
    """Return what is left of `span` before and after `charged`."""
    if charged.end_s <= span.start_s or span.end_s <= charged.start_s:
        return [span]
    before = Span(span.start_s, charged.start_s)
    after = Span(charged.end_s, span.end_s)
    return [part for part in (before, after) if part.seconds > 0]


class Ledger:
    """The engine's accounts. The engine's thread writes; others read the plain totals."""

    def __init__(self, charge: Callable[[Work, float, bool], None]) -> None:
        """Start at zero.

        charge: is told how many seconds a piece of work is charged, and whether it had the device
        for itself, so that they are what such work takes.
        """
        self._charge = charge
        self._charged = ChargedTime()
        self.forwards = 0
        self.used_rows = 0
        self.padded_rows = 0
        self.image_steps = 0
        self.forward_s = 0.0
        self.padding_s = 0.0  # of these, for rows that belong to no image
        self.encode_s = 0.0
        self.decode_s = 0.0
        self.decodes = 0
        self.by_rows: dict[int, RowTotals] = defaultdict(RowTotals)
        self.seconds_by_rank: dict[int, float] = defaultdict(float)
        # In the device's order; True: a forward.
        self._launched: deque[tuple[Stopwatch, Callable[[Span], None], bool]] = deque()
        self._forwards_ahead = 0

    def enter_forward(
        self, batch: Batch, watch: Stopwatch, *, is_beside_decode: bool = False
    ) -> None:
        """Note a forward that was launched.

        `watch` is stopped, though the device may not be there yet.  is_beside_decode: a decode that
        was launched before is not over.
        """
        self.forwards += 1
        self.used_rows += batch.used_rows
        self.padded_rows += batch.bucket_rows - batch.used_rows
        self.image_steps += len(batch)
        for image in batch:
            account = image.account
            account.forwards += 1
            account.rows_total += batch.used_rows
            account.max_rows = max(account.max_rows, batch.used_rows)
            account.max_images = max(account.max_images, len(batch))
            account.shared_forwards += any(
                other.request.group != image.request.group for other in batch
            )
        share_out = partial(self._share_out, batch, is_beside_decode)
        self._launched.append((watch, share_out, True))
        self._forwards_ahead += 1

    def enter_encode(self, work: Encode, watch: Stopwatch) -> None:
        """Note an encode that was launched; it belongs to its image alone."""
        self._launched.append((watch, partial(self._book_encode, work), False))

    def book(self, run_ahead: int) -> None:
        """Book everything that is over, and wait until at most `run_ahead` forwards are not.

        Waiting here is what keeps the engine from running more than `run_ahead` forwards ahead of a
        GPU: a newcomer or a cancel would meet a queue of forwards already launched.
        """
        while self._launched and (
            self._forwards_ahead > run_ahead or self._launched[0][0].is_ready
        ):
            self._book_first()

    def book_decode(self, work: Decode, span: Span) -> None:
        """Book a decode that is over, and with it every forward that is.

        All forwards of this image are over, so its account is complete. Forwards that ran beside
        the decode are charged first, and the decode for what is left.
        """
        while self._launched and self._launched[0][0].is_ready:
            self._book_first()
        seconds = self._add(work, span)
        work.image.account.decode_s += seconds
        self.seconds_by_rank[work.image.rank] += seconds
        self.decode_s += seconds
        self.decodes += 1

    def _book_first(self) -> None:
        watch, book, is_forward = self._launched.popleft()
        self._forwards_ahead -= is_forward
        book(watch.span())

    def _add(self, work: Work, span: Span, is_beside_decode: bool = False) -> float:
        """Charge the work for what of its span nobody was charged for; return those seconds."""
        seconds = self._charged.add(span)
        was_alone = not is_beside_decode and seconds >= span.seconds
        self._charge(work, seconds, was_alone)
        return seconds

    def _book_encode(self, work: Encode, span: Span) -> None:
        seconds = self._add(work, span)
        work.image.account.encode_s += seconds
        self.seconds_by_rank[work.image.rank] += seconds
        self.encode_s += seconds

    def _share_out(self, batch: Batch, is_beside_decode: bool, span: Span) -> None:
        seconds = self._add(batch, span, is_beside_decode)
        self.forward_s += seconds
        totals = self.by_rows[batch.bucket_rows]
        totals.forwards += 1
        totals.seconds += seconds
        padding_s = seconds * (batch.bucket_rows - batch.used_rows) / batch.bucket_rows
        self.padding_s += padding_s
        for image, part in batch.parts:
            image.account.denoise_s += seconds * part
            image.account.padding_s += padding_s * part
            self.seconds_by_rank[image.rank] += seconds * part

    @property
    def mean_decode_s(self) -> float:
        """Return the mean seconds of one decode."""
        return self.decode_s / self.decodes if self.decodes else 0.0

    def stats(self) -> dict[str, Any]:
        """Return plain numbers since the start; any thread may ask.

        A step counts once for the batch, an image step once per image in it.
        """
        by_rows = sorted(dict(self.by_rows).items())
        return {
            "steps": self.forwards,
            "image_steps": self.image_steps,
            "rows": self.used_rows,
            "padded_rows": self.padded_rows,
            "mean_rows_per_forward": self.used_rows / self.forwards if self.forwards else 0.0,
            "seconds_per_forward_by_rows": {rows: totals.mean_s for rows, totals in by_rows},
            "encode_s": self.encode_s,
            "forward_s": self.forward_s,
            "decode_s": self.decode_s,
            "padding_s": self.padding_s,
            "seconds_by_rank": dict(sorted(dict(self.seconds_by_rank).items())),
        }
