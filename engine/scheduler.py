"""Decide what the device does next: encode a prompt, advance a batch one step, or decode an image.

Pure bookkeeping: no tensors, no threads, no clock but the `now_s` it is handed, so a test can drive
it by hand. It does not know what a tier is; callers have already turned tiers into ranks. What
anything takes it asks of a `CostModel`, which it feeds in turn.

The rules, and why they are these, stand in docs/engine.md ("Which image goes next"). The words of
this module: an image has a *seat* while it may advance; a *group* is a rank's images of owners that
are ahead, or those of the others; a *lane* is what takes turns in a group, by batch key and pin; a
*rider* has its row in a forward that another leads, a *guest* is a rider of another group.
"""

import math
from bisect import bisect_left
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import accumulate
from weakref import WeakValueDictionary

from engine.costs import CostModel, Curve
from engine.inflight import BatchKey, InFlight, RenderState
from engine.owners import Owner, Owners
from engine.shares import Shares

MAX_PARKS = 2  # of an image; after that it keeps its seat
# The share of a forward's seconds by which a guest's encode may delay it; the guest fills rows that
# would stay empty.
CHEAP = 0.1
# The share of its remaining seconds by which another image of its rank must be ahead of an encoded
# one to take its seat.
HOLD = 0.25


@dataclass(frozen=True)
class Batch:
    """The images of one forward, in the order of their rows.

    What advancing changes of an image does not change its batch.
    """

    images: tuple[InFlight, ...]
    bucket_rows: int  # rows of the forward, padding included
    # The seconds its lane is charged until they are measured.
    predicted_s: float = field(default=0.0, compare=False)
    # True: its rank goes before a better one, for its share.
    is_owed: bool = field(default=False, compare=False)
    rows: tuple[int, ...] = field(init=False, compare=False)  # of each image
    key: BatchKey = field(init=False, compare=False)  # what all its images agree on

    def __post_init__(self) -> None:
        object.__setattr__(self, "rows", tuple(image.rows for image in self.images))
        object.__setattr__(self, "key", self.images[0].batch_key)

    @property
    def used_rows(self) -> int:
        """Count the rows that belong to an image; the rest is padding."""
        return sum(self.rows)

    @classmethod
    def alone(cls, image: InFlight) -> "Batch":
        """Give the forward this image would make by itself: its own rows, or its pinned bucket."""
        return cls((image,), image.request.pinned_rows or image.rows)

    @property
    def is_pinned(self) -> bool:
        """Tell whether this forward must have exactly `bucket_rows` rows."""
        return any(image.request.pinned_rows is not None for image in self.images)

    @property
    def parts(self) -> Iterator[tuple[InFlight, float]]:
        """Iterate over each image with its part of the forward's seconds.

        That part is its share of the rows used.
        """
        return (
            (image, rows / self.used_rows)
            for image, rows in zip(self.images, self.rows, strict=True)
        )

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[InFlight]:
        return iter(self.images)


@dataclass(frozen=True)
class _Single:
    image: InFlight
    predicted_s: float = field(default=0.0, compare=False)
    is_owed: bool = field(default=False, compare=False)
    key: BatchKey = field(init=False, compare=False)  # of its making, too

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.image.batch_key)

    @property
    def parts(self) -> Iterator[tuple[InFlight, float]]:
        """Iterate as a batch does: all of it is this image's."""
        return iter(((self.image, 1.0),))

    def __iter__(self) -> Iterator[InFlight]:
        return iter((self.image,))


class Encode(_Single):
    """Encode one image's prompt and draw its noise: it can be denoised after that."""


class Decode(_Single):
    """Decode one denoised image."""


Work = Encode | Batch | Decode
Group = tuple[int, bool]  # rank, is its owner ahead? Better ones compare as less


@dataclass(slots=True, eq=False, weakref_slot=True)
class _Kind:
    """Images that can share a forward: one batch key, one pin.

    What their work takes is as of the last look.
    """

    key: BatchKey
    pin: int | None
    curve: Curve
    # Seconds of the forward that an image of so many rows makes alone.
    solo_s: dict[int, float] = field(default_factory=dict)
    encode_s: float = 0.0
    decode_s: float = 0.0
    looked_at: int = 0

    def may_fill(self, other: "_Kind") -> bool:
        """Tell whether its images may use rows that a forward of the other only pads."""
        return self.key == other.key and self.pin is None and other.pin is not None


@dataclass(slots=True, eq=False)
class _Ticket:
    """An image here, and what only the scheduler knows of it."""

    image: InFlight
    arrival: int
    added_s: float
    home: _Kind  # as it arrived: with its group, the lane
    kind: _Kind  # of its next forward
    # The image's when `kind` was looked up: a pipeline's next forward may have another.
    seen_key: BatchKey
    owner: Owner = field(init=False)  # as it stands in the image's rank
    remaining_s: float = 0.0  # until it is decoded, if it were alone; as of the last look
    has_seat: bool = False
    parks: int = 0
    is_decoded: bool = False

    @property
    def group(self) -> Group:
        """Return the group within which the image takes turns and shares forwards."""
        return self.image.rank, self.owner.is_ahead

    @property
    def is_cheap_to_encode(self) -> bool:
        """Tell whether its encode hardly delays a forward of others in which it fills free rows."""
        return self.kind.encode_s <= CHEAP * self.kind.solo_s[self.image.rows]

    @property
    def is_pinned(self) -> bool:
        """Tell whether it has been parked so often that it keeps its seat."""
        return self.has_seat and self.parks >= MAX_PARKS


@dataclass(eq=False, repr=False)
class Scheduler:
    """Who is seated, who advances next, who waits for encode or decode.

    Starts without images. Raises `ValueError` for limits below 1, and for shares that leave nothing
    to other ranks.
    """

    costs: CostModel
    _: KW_ONLY
    max_inflight: int
    max_batch_rows: int
    max_encodes_between_steps: int = 4
    max_decodes_between_steps: float = math.inf
    row_buckets: tuple[int, ...] = ()  # ascending
    max_adapters: int = 8  # different ones in a forward
    # Parts of the device's seconds owed to ranks.
    rank_shares: Mapping[int, float] = field(default_factory=dict)
    share_patience_s: float = 0.0
    growth_ceiling: float = 0.85
    ageing: float = 0.05  # how much waiting counts against remaining seconds
    memory_budget_bytes: int | None = None

    _shares: Shares = field(init=False)
    _tickets: dict[str, _Ticket] = field(default_factory=dict, init=False)
    _arrivals: int = field(default=0, init=False)
    _now_s: float = field(default=0.0, init=False)
    _kinds: WeakValueDictionary[tuple[BatchKey, int | None], _Kind] = field(
        default_factory=WeakValueDictionary, init=False
    )
    _looks: int = field(default=0, init=False)
    _is_stale: bool = field(default=False, init=False)  # must seats be dealt anew?
    # Those with a seat or waiting for decode.
    _ready: list[_Ticket] = field(default_factory=list, init=False)
    _parked: list[InFlight] = field(default_factory=list, init=False)
    _resumed: list[InFlight] = field(default_factory=list, init=False)
    # By lane: seconds left in this round; below 0: overdrawn.
    _balances: dict[tuple[Group, _Kind], float] = field(default_factory=dict, init=False)
    _owners: dict[int, Owners] = field(default_factory=dict, init=False)  # by rank
    _encodes: int = field(default=0, init=False)  # since the last forward
    _decodes: int = field(default=0, init=False)
    _row_caps: dict[BatchKey, int] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        limits = (
            self.max_inflight,
            self.max_batch_rows,
            self.max_encodes_between_steps,
            self.max_decodes_between_steps,
        )
        _check_limits(limits, self.row_buckets)
        self._shares = Shares(self.rank_shares, self.share_patience_s)

    def __len__(self) -> int:
        return len(self._tickets)

    def __contains__(self, image_id: str) -> bool:
        return image_id in self._tickets

    # --- who is here ---

    def get(self, image_id: str) -> InFlight | None:
        """Give the image of that id, or None when it is not (or no longer) here."""
        ticket = self._tickets.get(image_id)
        return ticket.image if ticket is not None else None

    def in_order(self) -> list[InFlight]:
        """List every image here, best first, as of the last `now_s`."""
        return [ticket.image for ticket in self._sorted(self._tickets.values())]

    def add(self, image: InFlight, now_s: float) -> None:
        """Let an image in: queued, or encoded already.

        Raises `ValueError` when one of its id is here.
        """
        if image.id in self._tickets:
            raise ValueError(f"an image with id {image.id!r} is already here")
        self._now_s = now_s
        self._arrivals += 1
        kind = self._kind(image.batch_key, image.request.pinned_rows)
        self._tickets[image.id] = ticket = _Ticket(
            image, self._arrivals, now_s, kind, kind, image.batch_key
        )
        self._estimate([ticket])
        self._enter(ticket)
        self._is_stale = True

    def remove(self, image_id: str) -> None:
        """Forget an image, whatever its state. Harmless when it is not here."""
        ticket = self._tickets.pop(image_id, None)
        if ticket is not None:
            self._leave(ticket.image)
            self._is_stale = True

    def set_rank(self, image_id: str, rank: int) -> None:
        """Serve an image at another rank from the next step boundary on.

        Harmless when it is not here.
        """
        ticket = self._tickets.get(image_id)
        if ticket is not None:
            self._leave(ticket.image)
            ticket.image.rank = rank
            self._enter(ticket)
            self._is_stale = True

    def set_shares(self, rank_shares: Mapping[int, float]) -> None:
        """Owe ranks these parts of the device's seconds from the next step boundary on.

        Raises `ValueError` for shares that leave nothing to other ranks.
        """
        self._shares = self._shares.changed_to(rank_shares)
        self._is_stale = True

    def take_parked(self) -> list[InFlight]:
        """Give the images that lost their seat since the last call and are still here.

        Their state says so already.
        """
        parked = self._parked
        self._parked = []
        return [image for image in parked if image.id in self._tickets]

    def take_resumed(self) -> list[InFlight]:
        """Give the images that regained a seat since the last call and are still here.

        Their state says so already.
        """
        resumed = self._resumed
        self._resumed = []
        return [image for image in resumed if image.id in self._tickets]

    def cap_rows(self, key: BatchKey, rows: int) -> None:
        """Limit later best-effort forwards of this batch key to `rows` rows.

        The device could not hold more.
        """
        self._row_caps[key] = max(1, min(rows, self._row_caps.get(key, rows)))

    def forget(self, checkpoint: str) -> None:
        """Drop what was learnt of a checkpoint of which no image is here."""
        self._row_caps = {
            key: rows for key, rows in self._row_caps.items() if key.checkpoint != checkpoint
        }

    # --- what is done ---

    def next_work(self, now_s: float) -> Work | None:
        """Tell what the device should do now; None when there is nothing to do.

        The same again until something is settled or changed.
        """
        self._bring_up_to_date(now_s)
        ready = self._sorted(self._ready)
        best: dict[int, Group] = {}  # of each rank
        for ticket in ready:
            best.setdefault(ticket.image.rank, ticket.group)
        self._shares.note_ready(best)
        if not ready:
            return None
        for rank in self._shares.in_credit():
            if rank != ready[0].image.rank:
                work = self._work_of(best[rank], ready)
                if self._shares.covers(rank, work.predicted_s):
                    return replace(work, is_owed=True)
        return self._work_of(ready[0].group, ready)

    def settle(self, work: Work) -> None:
        """Note that the work is done.

        After an encode the image runs; after a batch its images have counted their step. Images
        that took their last step now wait for decode; a decoded one is not offered again and stays
        until it is removed.
        """
        self._spend(work, work.predicted_s)
        self._count_since_forward(work)
        for image in work:
            ticket = self._tickets.get(image.id)
            if ticket is None:
                continue  # it failed or was canceled meanwhile
            if isinstance(work, Decode):
                ticket.is_decoded = self._is_stale = True
            elif image.is_denoised:
                image.state = RenderState.DENOISED
                self._is_stale = True

    def charge(self, work: Work, seconds: float, was_alone: bool = True) -> None:
        """Note the seconds that the work took on the device, perhaps some turns later.

        Its lane pays those instead of the predicted ones. What was not alone on the device teaches
        nothing of what such work takes.
        """
        self._spend(work, seconds - work.predicted_s)
        if not was_alone:
            return
        if isinstance(work, Batch):
            self.costs.observe_step(work.key, work.bucket_rows, seconds)
        elif isinstance(work, Encode):
            self.costs.observe_encode(work.key, seconds)
        else:
            self.costs.observe_decode(work.key, seconds)

    # --- turns ---

    def _bring_up_to_date(self, now_s: float) -> None:
        """Look up again what images need, and deal the seats anew where something changed."""
        self._now_s = now_s
        for owners in self._owners.values():
            self._is_stale |= owners.compare()
        self._estimate(self._tickets.values() if self._is_stale else self._ready)
        if self._is_stale:
            self._deal_seats()

    def _count_since_forward(self, work: Work) -> None:
        """Count the encodes and decodes that were done since the last forward."""
        if isinstance(work, Batch):
            self._encodes = self._decodes = 0
        elif isinstance(work, Encode):
            self._encodes += 1
        else:
            self._decodes += 1

    def _work_of(self, group: Group, ready: Sequence[_Ticket]) -> Work:
        """Tell what comes next for this group, which has work ready.

        `ready` is everybody, best first.
        """
        mine = [ticket for ticket in ready if ticket.group == group]
        can_denoise = any(ticket.image.state is RenderState.RUNNING for ticket in mine)
        may_decode = not can_denoise or self._decodes < self.max_decodes_between_steps
        may_encode = not can_denoise or self._encodes < self.max_encodes_between_steps
        pool = []
        for ticket in mine:
            image = ticket.image
            if image.state is RenderState.RUNNING or (
                image.state is RenderState.QUEUED and may_encode
            ):
                pool.append(ticket)
            elif image.state is RenderState.DENOISED and may_decode:
                return Decode(image, ticket.kind.decode_s)
        others = [ticket for ticket in ready if ticket.group != group]
        batch = self._next_batch(pool, _guests(others, may_encode=may_encode))
        newcomer = next((image for image in batch if image.state is RenderState.QUEUED), None)
        if newcomer is not None:
            return Encode(newcomer, self.costs.encode_s(newcomer.batch_key))
        return batch

    def _spend(self, work: Work, seconds: float) -> None:
        """Let the lane that had the turn pay for it.

        Every rank and every owner has had its part.
        """
        lead = self._tickets.get(next(iter(work)).id)
        by_rank: dict[int, float] = {}
        for image, part in work.parts:
            by_rank[image.rank] = by_rank.get(image.rank, 0.0) + part
        self._shares.spend(
            by_rank, seconds, owed_to=next(iter(work)).rank if work.is_owed else None
        )
        if lead is not None and (lead.group, lead.home) in self._balances:
            self._balances[lead.group, lead.home] -= seconds
        for image, part in work.parts:
            ticket = self._tickets.get(image.id)
            if ticket is not None:
                ticket.owner.attained_s += seconds * part

    # --- owners ---

    def _enter(self, ticket: _Ticket) -> None:
        owners = self._owners.setdefault(ticket.image.rank, Owners())
        ticket.owner = owners.enter(ticket.image.request.owner, ticket.remaining_s)

    def _leave(self, image: InFlight) -> None:
        owners = self._owners[image.rank]
        owners.leave(image.request.owner)
        if not owners:
            # The times of owners that left go too: nobody remains to compare them with.
            del self._owners[image.rank]

    # --- order and seats ---

    def _estimate(self, tickets: Iterable[_Ticket]) -> None:
        """Look up again what each image still needs."""
        self._looks += 1
        for ticket in tickets:
            image = ticket.image
            if ticket.seen_key is not image.batch_key:
                ticket.kind = self._kind(image.batch_key, ticket.kind.pin)
                ticket.seen_key = image.batch_key
            kind = ticket.kind
            if kind.looked_at != self._looks:
                self._look_at(kind)
            if image.rows not in kind.solo_s:
                kind.solo_s[image.rows] = kind.curve.seconds(kind.pin or self._padded(image.rows))
            steps_left = image.num_steps - image.step
            ticket.remaining_s = steps_left * kind.solo_s[image.rows] + kind.decode_s
            if image.state is RenderState.QUEUED:
                ticket.remaining_s += kind.encode_s

    def _look_at(self, kind: _Kind) -> None:
        """Look up what work of this kind takes by now."""
        kind.looked_at = self._looks
        kind.curve = self.costs.curve(kind.key)
        kind.solo_s.clear()
        kind.encode_s = self.costs.encode_s(kind.key)
        kind.decode_s = self.costs.decode_s(kind.key)

    def _sorted(self, tickets: Iterable[_Ticket], hold: float = 0.0) -> list[_Ticket]:
        """Sort by priority, best first.

        With `hold`, running images with a seat are ahead by that share of what they still need.
        """

        def place(ticket: _Ticket) -> tuple[Group, float, int]:
            score = ticket.remaining_s - self.ageing * (self._now_s - ticket.added_s)
            if hold and ticket.has_seat and ticket.image.state is RenderState.RUNNING:
                score -= hold * ticket.remaining_s
            return ticket.group, score, ticket.arrival

        return sorted(tickets, key=place)

    def _deal_seats(self) -> None:
        self._is_stale = False
        self._ready = []
        waiting = []
        for ticket in self._tickets.values():
            if ticket.is_decoded:
                continue
            if ticket.image.state is RenderState.DENOISED or ticket.is_pinned:
                self._ready.append(ticket)
            else:
                waiting.append(ticket)
        seated, others = self._seated(waiting)
        self._seat(seated)
        self._unseat(others)

    def _seat(self, tickets: Iterable[_Ticket]) -> None:
        for ticket in tickets:
            ticket.has_seat = True
            self._ready.append(ticket)
            if ticket.image.state is RenderState.PARKED:
                ticket.image.state = RenderState.RUNNING
                self._resumed.append(ticket.image)

    def _unseat(self, tickets: Iterable[_Ticket]) -> None:
        for ticket in tickets:
            ticket.has_seat = False
            if ticket.image.state is RenderState.RUNNING:
                ticket.image.state = RenderState.PARKED
                ticket.parks += 1
                self._parked.append(ticket.image)

    def _in_seat_order(self, waiting: Iterable[_Ticket]) -> list[_Ticket]:
        """Sort by who is seated first: the best of each lane, for at most half of the seats."""
        in_order = self._sorted(waiting, HOLD)
        best_of_lane: dict[tuple[Group, _Kind], _Ticket] = {}
        for ticket in in_order:
            best_of_lane.setdefault((ticket.group, ticket.home), ticket)
        first = set(list(best_of_lane.values())[: self.max_inflight // 2])
        in_order.sort(key=lambda ticket: (ticket.group, ticket not in first))
        return in_order

    def _seated(self, waiting: Iterable[_Ticket]) -> tuple[list[_Ticket], list[_Ticket]]:
        """Tell who of these has a seat, and who has none."""
        seats = self._shares.seats(self.max_inflight)
        taken = Counter[int]()
        kept = list[_Ticket]()
        others = list[_Ticket]()
        for ticket in self._in_seat_order(waiting):
            rank = ticket.image.rank
            # The best of all has a seat whatever worse ranks keep.
            if not kept or taken[rank] < seats.get(rank, 0):
                kept.append(ticket)
                taken[rank] += 1
            else:
                others.append(ticket)
        free = max(0, self.max_inflight - len(kept))
        return kept + others[:free], others[free:]

    # --- lanes ---

    def _kind(self, key: BatchKey, pin: int | None) -> _Kind:
        kind = self._kinds.get((key, pin))
        if kind is None:
            self._kinds[key, pin] = kind = _Kind(key, pin, self.costs.curve(key))
        return kind

    def _next_batch(self, pool: Sequence[_Ticket], guests: Sequence[_Ticket]) -> Batch:
        """Give the forward of the lane whose turn it is.

        `pool` is everybody of its group who may ride, `guests` those of others, best first.
        """
        leads: dict[_Kind, _Ticket] = {}  # the best of each lane
        for ticket in pool:
            leads.setdefault(ticket.home, ticket)
        lead = self._whose_turn(pool[0].group, leads)
        kind = lead.kind
        own = [
            lead.image,
            *(ticket.image for ticket in pool if ticket is not lead and _may_join(ticket, lead)),
        ]
        if kind.pin is None:
            riders, bucket_rows = self._grown(kind, own)
        else:
            riders = own[:1]
            bucket_rows = kind.pin
        fitting = [
            ticket.image
            for ticket in (*pool, *guests)
            if _may_join(ticket, lead) or ticket.kind.may_fill(kind)
        ]
        return self._filled(kind, riders, bucket_rows, own + fitting)

    def _whose_turn(self, group: Group, leads: dict[_Kind, _Ticket]) -> _Ticket:
        """Give the best of these, one of each ready lane of a group, whose lane has seconds left.

        A new round when none has.
        """
        quantum = max(lead.kind.solo_s[lead.image.rows] for lead in leads.values())
        most = max(self._balances.setdefault((group, home), quantum) for home in leads)
        if most <= 0:
            self._start_round(group, leads, quantum - most)
        return next(lead for home, lead in leads.items() if self._balances[group, home] > 0)

    def _start_round(self, group: Group, ready: Container[_Kind], seconds: float) -> None:
        """Give every lane of the group the same.

        One that is not ready may pay its debts with it, but keeps no credit.
        """
        for lane, balance in list(self._balances.items()):
            if lane[0] == group:
                self._balances[lane] = balance + seconds
                if lane[1] not in ready and balance + seconds >= 0:
                    del self._balances[lane]

    # --- growth ---

    def _grown(self, kind: _Kind, own: Sequence[InFlight]) -> tuple[list[InFlight], int]:
        """Choose who joins the first image in a best-effort forward because it pays.

        Returns them with the rows of the forward. Where the next image alone does not pay, some
        together may: a curve with a jump in it is crossed by as many as make it worth.
        """
        lead = own[0]
        most_rows = self._most_rows(kind.key)
        riders = [lead]
        joining = list[InFlight]()
        rows = lead.rows
        joining_rows = 0
        bucket_rows = self._padded(rows) if self._padded(rows) <= most_rows else rows
        for image in own[1:]:
            if rows + joining_rows >= most_rows:
                break
            to_rows = self._padded(rows + joining_rows + image.rows)
            if to_rows > most_rows or not self._can_carry([*riders, *joining], image):
                continue
            joining.append(image)
            joining_rows += image.rows
            if kind.curve.is_worth_growing(
                bucket_rows, to_rows, used_rows=joining_rows, ceiling=self.growth_ceiling
            ):
                riders = riders + joining
                joining = []
                rows = rows + joining_rows
                joining_rows = 0
                bucket_rows = to_rows
        return self._divided(kind, riders, bucket_rows)

    def _divided(
        self, kind: _Kind, riders: list[InFlight], bucket_rows: int
    ) -> tuple[list[InFlight], int]:
        """Leave the last to the forwards after this one where all are done sooner so.

        Each that joined was cheaper than alone; in company of its own it may be cheaper still. A
        ceiling above 1 asks for company whatever it costs.
        """
        if self.growth_ceiling > 1:
            return riders, bucket_rows
        sums = list(accumulate(image.rows for image in riders))
        part = kind.curve.best_part(sums[-1], sums[:-1], self._padded)
        if part == sums[-1]:
            return riders, bucket_rows
        return riders[: sums.index(part) + 1], self._padded(part)

    def _filled(
        self,
        kind: _Kind,
        riders: Sequence[InFlight],
        bucket_rows: int,
        candidates: Sequence[InFlight],
    ) -> Batch:
        """Make the forward of `bucket_rows` rows, and give its free rows to whoever fits.

        Earlier candidates go first.
        """
        taken = list(riders)
        free = bucket_rows - sum(image.rows for image in riders)
        for image in candidates if free else ():
            if image.rows <= free and image not in taken and self._can_carry(taken, image):
                taken.append(image)
                free -= image.rows
        return Batch(tuple(taken), bucket_rows, kind.curve.seconds(bucket_rows))

    def _can_carry(self, images: Sequence[InFlight], newcomer: InFlight) -> bool:
        """Do these and the newcomer need no more different adapters than one forward can hold?"""
        if not newcomer.request.adapters:
            return True
        return (
            len({use.name for image in (*images, newcomer) for use in image.request.adapters})
            <= self.max_adapters
        )

    def _most_rows(self, key: BatchKey) -> int:
        """Tell the rows that a best-effort forward may have.

        An image that alone has more still runs alone.
        """
        limits = (
            self.max_batch_rows,
            self._row_caps.get(key),
            self.costs.row_limit(key, self.memory_budget_bytes),
        )
        return min(limit for limit in limits if limit is not None)

    def _padded(self, rows: int) -> int:
        """Give the smallest row bucket that holds `rows`; `rows` itself where none does."""
        place = bisect_left(self.row_buckets, rows)
        return self.row_buckets[place] if place < len(self.row_buckets) else rows


def _check_limits(limits: Iterable[float], row_buckets: tuple[int, ...]) -> None:
    if min(limits) < 1:
        raise ValueError(
            "max_inflight, max_batch_rows and the encodes and decodes between steps "
            "must be at least 1"
        )
    if list(row_buckets) != sorted(set(row_buckets)) or min(row_buckets, default=1) < 1:
        raise ValueError(f"row_buckets {row_buckets} are not ascending numbers of rows")


def _guests(others: Sequence[_Ticket], *, may_encode: bool) -> list[_Ticket]:
    """List those of other groups that may ride along: the encoded, then the cheap to encode."""
    guests = [ticket for ticket in others if ticket.image.state is RenderState.RUNNING]
    if may_encode:
        guests += [
            ticket
            for ticket in others
            if ticket.image.state is RenderState.QUEUED and ticket.is_cheap_to_encode
        ]
    return guests


def _may_join(ticket: _Ticket, lead: _Ticket) -> bool:
    """Tell whether the image may ride in a forward that `lead` leads.

    A new image of a pipeline learns its call by its encode: until then its lane decides.
    """
    return ticket.kind is lead.kind or (
        ticket.image.state is RenderState.QUEUED and ticket.home is lead.home
    )
