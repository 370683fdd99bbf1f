"""Decide at thresholds of a worker and of the sweeper: take a job, keep a snapshot, drop work.

Plain values in, a decision out. The clock, the broker and the hand-off are read by the callers in
`tasks/` and `edges/`, rows by those in `models/`, so each threshold can be tested without them.
"""

from collections.abc import Mapping
from datetime import datetime

from policy import admission, queues, tiers
from policy.fleet import Fleet

HANDOFF_SILENT_AFTER_S = 5.0  # without an answer: what would be rendered could not be handed on
HANDOFF_FULL_FOR_SNAPSHOTS = 0.6  # of its memory: what is rendered needs the rest more
LONGEST_MARGIN_S = 5.0  # of a notice, kept for taking snapshots, storing them and ending
OVERTAKEN_BY_S = 2.0
MOST_HANDED_OUT = 200  # messages of one queue that nobody has taken yet
INPUTS_LATE_AFTER_S = 5.0  # pictures that were asked for that long ago: the store may be back
INPUTS_LOST_AFTER_S = 60.0  # or, while other messages wait in that queue, theirs may have been lost
MOST_HAND_OFFS_LOST = 5  # of one image: pixels that wait in vain for an hour each, as a rule


def believed_fill(last_fill: float, *, silent_s: float, trusted_for_s: float) -> float:
    """Return how full the hand-off is, 0..1: its last answer, and 1.0 once that is too old.

    silent_s: since it last answered and took what was written.
    """
    return last_fill if silent_s <= trusted_for_s else 1.0


def may_take_from(
    fleet: Fleet,
    queue: str,
    held: Mapping[str, int],
    slots: int,
    *,
    fill: float,
    is_leaving: bool,
    is_reserved: bool,
) -> bool:
    """Decide whether a worker takes its next message from this render queue.

    held: images in its hand, by tier.  fill: of the hand-off, 0..1.  is_leaving: it has to go.
    is_reserved: a job has, or waits to have, the worker to itself.
    """
    tier, is_front = queues.tier_of(queue)
    if is_leaving or is_reserved:
        return False
    if tier not in fleet.tiers:  # it left since the queues were listed
        return False
    # Jobs that come back are taken all the same: their snapshots are in the hand-off.
    if fill > admission.HANDOFF_FULL and not is_front:
        return False
    return tiers.may_take(fleet, tier, held, slots, is_front=is_front)


def may_keep_snapshot(fill: float) -> bool:
    """Decide whether a snapshot on the way is kept in a hand-off so full (0..1)."""
    return fill <= HANDOFF_FULL_FOR_SNAPSHOTS


def offered_slots(slots: int, *, is_leaving: bool) -> int:
    """Return the slots that a worker's heartbeat offers: none once it has to go."""
    return 0 if is_leaving else slots


def must_drop_work(silent_s: float, *, stop_s: float) -> bool:
    """Decide whether a worker that renewed nothing for `silent_s` stops its work by itself."""
    return silent_s > stop_s


def give_up_after_s(within_s: float) -> float:
    """Return how long a worker goes on after a notice of `within_s`; the rest is a margin."""
    return max(0.0, within_s - min(LONGEST_MARGIN_S, within_s / 2))


def will_finish(unrendered: int, expected_s: float | None, left_s: float) -> bool:
    """Decide whether a job is done before its worker has to give it up.

    unrendered: its images that are not handed on.  expected_s: until the last of them is;
    None: nobody can say.
    """
    return unrendered == 0 or (expected_s is not None and expected_s < left_s)


def may_end_leases(now: float, *, outage_noted_at: float | None, renew_s: float) -> bool:
    """Decide whether the sweeper may end leases that ran out.

    After an outage of Postgres workers first get the time to renew: they were not silent.
    now, outage_noted_at: of one monotonic clock.
    """
    return outage_noted_at is None or now >= outage_noted_at + renew_s


def was_overtaken(announced_at: datetime, *, next_announced_at: datetime) -> bool:
    """Decide whether a job's message was popped and lost: the next in line is clearly younger."""
    return (next_announced_at - announced_at).total_seconds() > OVERTAKEN_BY_S


def is_backed_up(waiting: int) -> bool:
    """Decide whether a queue with so many messages gets no more: nobody takes any for now."""
    return waiting > MOST_HANDED_OUT


def is_unstorable(hand_offs_lost: int) -> bool:
    """Decide whether a job fails because the pixels of one of its images were lost so often."""
    return hand_offs_lost >= MOST_HAND_OFFS_LOST


def inputs_late_after_s(waiting: int) -> float:
    """Return after how long pictures that were asked for are asked for again.

    waiting: messages in the queue of whoever stages them, among which the first request may be.
    """
    return INPUTS_LOST_AFTER_S if waiting else INPUTS_LATE_AFTER_S
