"""Account for the device's time: each forward's seconds, shared out to the images in it.

A GPU's seconds are known only after it has passed them, so work is entered when launched and booked
when it is over.
"""

from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from engine.device import Stopwatch
from engine.scheduler import Batch, Decode, Encode, Work


@dataclass
class RowTotals:
    """Forwards of one size."""

    forwards: int = 0
    seconds: float = 0.0

    @property
    def mean_s(self) -> float:
        """Return the mean seconds of one forward."""
        return self.seconds / self.forwards if self.forwards else 0.0


class Ledger:
    """The engine's accounts. The engine's thread writes; others read the plain totals."""

    def __init__(self, charge: Callable[[Work, float], None]) -> None:
        self._charge = charge  # who else must know how long a piece of work took
        self.forwards = 0
        self.used_rows = 0
        self.padded_rows = 0
        self.image_steps = 0
        self.forward_s = 0.0
        self.encode_s = 0.0
        self.decode_s = 0.0
        self.decodes = 0
        self.by_rows: dict[int, RowTotals] = defaultdict(RowTotals)
        self.seconds_by_rank: dict[int, float] = defaultdict(float)
        # In the device's order; True: a forward.
        self._launched: deque[tuple[Stopwatch, Callable[[float], None], bool]] = deque()
        self._forwards_ahead = 0

    def enter_forward(self, batch: Batch, watch: Stopwatch) -> None:
        """Note a forward that was launched.

        `watch` is stopped, though the device may not be there yet.
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
        self._launched.append((watch, partial(self._share_out, batch), True))
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

    def book_decode(self, work: Decode, seconds: float) -> None:
        """Book a decode that is over, and with it every forward that is.

        All forwards of this image are over, so its account is complete.
        """
        while self._launched and self._launched[0][0].is_ready:
            self._book_first()
        self._charge(work, seconds)
        work.image.account.decode_s += seconds
        self.seconds_by_rank[work.image.rank] += seconds
        self.decode_s += seconds
        self.decodes += 1

    def _book_first(self) -> None:
        watch, book, is_forward = self._launched.popleft()
        self._forwards_ahead -= is_forward
        book(watch.seconds())

    def _book_encode(self, work: Encode, seconds: float) -> None:
        self._charge(work, seconds)
        work.image.account.encode_s += seconds
        self.seconds_by_rank[work.image.rank] += seconds
        self.encode_s += seconds

    def _share_out(self, batch: Batch, seconds: float) -> None:
        self._charge(batch, seconds)
        self.forward_s += seconds
        totals = self.by_rows[batch.bucket_rows]
        totals.forwards += 1
        totals.seconds += seconds
        for image, part in batch.parts:
            image.account.denoise_s += seconds * part
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
            "seconds_by_rank": dict(sorted(dict(self.seconds_by_rank).items())),
        }
