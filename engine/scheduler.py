"""Decide which in-flight images advance in the next denoise step.

Pure bookkeeping: no tensors, no clock, no threads, so a test can drive it by hand. It does not know what a tier is; callers have
already turned tiers into ranks.

The order is rank, then arrival. The first `max_inflight` images in that order hold a seat; whoever is displaced by a better rank
is parked with its state in place (it is small) and comes back when a seat is free. At every step boundary the seats are asked
anew, so a newcomer joins the very next forward and a parked image simply is not in it.

A *lane* is a batch key together with a pinned number of rows (None for best effort). Lanes whose first image has the best rank
take turns: the one unserved for longest leads, so an odd size neither blocks the others nor starves. A pinned lane always makes a
forward of exactly its bucket and lends spare rows to best-effort images of the same batch key.
"""

from bisect import insort
from collections.abc import Iterator
from dataclasses import dataclass

from engine.inflight import BatchKey, ImageState, InFlight

Lane = tuple[BatchKey, int | None]


@dataclass(frozen=True)
class Batch:
    """The images of one forward, in the order of their rows."""

    images: tuple[InFlight, ...]
    bucket_rows: int  # rows of the forward, padding included

    @classmethod
    def alone(cls, image: InFlight) -> "Batch":
        """The forward this image would make by itself: its own rows, or its pinned bucket."""
        return cls((image,), image.request.pinned_rows or image.rows)

    @property
    def key(self) -> BatchKey:
        """What all its images agree on."""
        return self.images[0].batch_key

    @property
    def used_rows(self) -> int:
        """Rows that belong to an image; the rest is padding."""
        return sum(image.rows for image in self.images)

    @property
    def is_pinned(self) -> bool:
        """Must this forward have exactly `bucket_rows` rows?"""
        return any(image.request.pinned_rows is not None for image in self.images)

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[InFlight]:
        return iter(self.images)


class Scheduler:
    """Who is seated, who advances next, who waits for encode or decode."""

    def __init__(self, *, max_inflight: int, max_batch_rows: int) -> None:
        if max_inflight < 1 or max_batch_rows < 1:
            raise ValueError("max_inflight and max_batch_rows must be at least 1")
        self.max_inflight = max_inflight
        self.max_batch_rows = max_batch_rows
        self._arrivals = 0
        self._turn = 0
        self._images: dict[str, InFlight] = {}
        self._order: list[tuple[int, int, str]] = []  # (rank, arrival, id), sorted
        self._place: dict[str, tuple[int, int, str]] = {}
        self._last_turn: dict[str, int] = {}  # the turn in which an image last advanced; on arrival, the turn before its first chance
        self._row_caps: dict[BatchKey, int] = {}

    def __len__(self) -> int:
        return len(self._images)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._images

    def get(self, image_id: str) -> InFlight | None:
        """The image of that id, or None when it is not (or no longer) here."""
        return self._images.get(image_id)

    def in_order(self) -> list[InFlight]:
        """Every image here, best first."""
        return [self._images[image_id] for _, _, image_id in self._order]

    def add(self, image: InFlight) -> None:
        """Let an image in behind everybody of its rank. It may be part of the next batch if it is encoded by then."""
        if image.id in self._images:
            raise ValueError(f"an image with id {image.id!r} is already here")
        self._arrivals += 1
        place = (image.request.rank, self._arrivals, image.id)
        insort(self._order, place)
        self._place[image.id] = place
        self._images[image.id] = image
        self._last_turn[image.id] = self._turn

    def remove(self, image_id: str) -> None:
        """Forget an image, whatever its state. Harmless when it is not here."""
        if self._images.pop(image_id, None) is not None:
            self._order.remove(self._place.pop(image_id))
            del self._last_turn[image_id]

    def seated(self) -> list[InFlight]:
        """The images that may advance now, best first; those waiting for decode need no seat."""
        seats: list[InFlight] = []
        for _, _, image_id in self._order:
            if len(seats) == self.max_inflight:
                break
            image = self._images[image_id]
            if image.state in (ImageState.QUEUED, ImageState.RUNNING):
                seats.append(image)
        return seats

    def next_encodes(self, limit: int) -> list[InFlight]:
        """Seated images whose prompt is not encoded yet, best first, at most `limit`."""
        return [image for image in self.seated() if image.state is ImageState.QUEUED][:limit]

    def next_batch(self) -> Batch | None:
        """The images that share the next forward; None when nobody is ready to advance."""
        ready = [image for image in self.seated() if image.state is ImageState.RUNNING]
        if not ready:
            return None
        lanes: dict[Lane, Batch] = {}
        for image in ready:
            lane = _lane_of(image)
            if image.request.rank == ready[0].request.rank and lane not in lanes:
                lanes[lane] = self._fill(lane, ready)
        # min() keeps the first of equals, and lanes are in the order of their first image.
        lead = min(lanes, key=lambda lane: (self._unserved_since(lane, lanes[lane]), -len(lanes[lane])))
        return lanes[lead]

    def settle(self, batch: Batch) -> list[InFlight]:
        """Count the step for every image of the batch that is still here; return those that now wait for decode."""
        self._turn += 1
        denoised = []
        for image in batch:
            if image.id not in self._images:
                continue  # it failed or was canceled in this very step
            image.step += 1
            self._last_turn[image.id] = self._turn
            if image.is_denoised:
                image.state = ImageState.DENOISED
                denoised.append(image)
        return denoised

    def next_decodes(self) -> list[InFlight]:
        """Images to decode before the next denoise step, best first.

        Nothing is closer to its end than a denoised image, so all go that no running image outranks. Of the others one goes, for
        a decode is as long as several steps and the better rank should not wait for more than that.
        """
        denoised = [image for image in self.in_order() if image.state is ImageState.DENOISED]
        running_ranks = [image.request.rank for image in self.seated()]
        best_running = min(running_ranks) if running_ranks else None
        unhindered = [image for image in denoised if best_running is None or image.request.rank <= best_running]
        return unhindered or denoised[:1]

    def cap_rows(self, key: BatchKey, rows: int) -> None:
        """Never again make a best-effort forward of more than `rows` rows for this batch key: the device could not hold it."""
        self._row_caps[key] = max(1, min(rows, self._row_caps.get(key, rows)))

    def _fill(self, lane: Lane, ready: list[InFlight]) -> Batch:
        """The forward this lane would make: its own images first, then guests for the spare rows of a pinned bucket."""
        key, pin = lane
        own = [image for image in ready if _lane_of(image) == lane]
        guests = [image for image in ready if pin is not None and _lane_of(image) == (key, None)]
        limit = pin if pin is not None else min(self.max_batch_rows, self._row_caps.get(key, self.max_batch_rows))
        taken = [own[0]]  # always, so that no cap can starve a request that needs more rows than it
        free = limit - own[0].rows
        for image in own[1:] + guests:
            if image.rows <= free:
                taken.append(image)
                free -= image.rows
        used = sum(image.rows for image in taken)
        return Batch(tuple(taken), pin if pin is not None else used)

    def _unserved_since(self, lane: Lane, batch: Batch) -> int:
        """The turn after which some image this lane would take has not advanced; guests do not count."""
        return min(self._last_turn[image.id] for image in batch if _lane_of(image) == lane)


def _lane_of(image: InFlight) -> Lane:
    return image.batch_key, image.request.pinned_rows
