"""At which values a worker takes nothing more, keeps nothing, stops, and the sweeper waits."""

from datetime import UTC, datetime, timedelta

import pytest

from policy import gates
from tests.builders import a_fleet

AT = datetime(2026, 11, 30, tzinfo=UTC)


def may_take(queue="local.fast", held=None, **changes):
    closed = {"fill": 0.0, "is_leaving": False, "is_reserved": False} | changes
    return gates.may_take_from(a_fleet(), queue, held or {}, 16, **closed)


def test_worker_takes_jobs_while_the_hand_off_is_at_most_four_fifths_full():
    assert may_take(fill=0.8)
    assert not may_take(fill=0.81)


def test_worker_takes_jobs_that_come_back_however_full_the_hand_off_is():
    assert may_take("local.fast.front", fill=1.0)


@pytest.mark.parametrize("queue", ["local.fast", "local.fast.front"])
@pytest.mark.parametrize("why", ["is_leaving", "is_reserved"])
def test_worker_that_leaves_or_is_reserved_takes_nothing(queue, why):
    assert may_take(queue)
    assert not may_take(queue, **{why: True})


def test_worker_takes_by_the_tier_of_the_queue_and_by_what_it_holds():
    full_of_fast = {"fast": 16}

    assert not may_take("local.fast", full_of_fast)
    assert may_take("local.fast.front", full_of_fast), "beyond its slots, from the front"
    assert may_take("local.batch", full_of_fast), "what is guaranteed"


def test_hand_off_counts_as_full_after_five_silent_seconds():
    seen = {"trusted_for_s": gates.HANDOFF_SILENT_AFTER_S}

    assert gates.believed_fill(0.3, silent_s=5.0, **seen) == 0.3
    assert gates.believed_fill(0.3, silent_s=5.1, **seen) == 1.0


def test_snapshots_are_kept_in_a_hand_off_at_most_three_fifths_full():
    assert gates.may_keep_snapshot(0.6)
    assert not gates.may_keep_snapshot(0.61)


def test_worker_that_leaves_offers_no_slots():
    assert gates.offered_slots(16, is_leaving=False) == 16
    assert gates.offered_slots(16, is_leaving=True) == 0


def test_worker_drops_its_work_once_nothing_was_renewed_for_longer_than_stop_s():
    assert not gates.must_drop_work(12.0, stop_s=12.0)
    assert gates.must_drop_work(12.1, stop_s=12.0)


@pytest.mark.parametrize(("within_s", "goes_on_s"), [(120, 115), (10, 5), (4, 2), (0, 0)])
def test_notice_keeps_a_margin_of_half_of_itself_and_five_seconds_at_most(within_s, goes_on_s):
    assert gates.give_up_after_s(within_s) == goes_on_s


@pytest.mark.parametrize(
    ("unrendered", "expected_s", "finishes"),
    [(2, 1.9, True), (2, 2.0, False), (2, None, False), (0, None, True), (0, 9.0, True)],
)
def test_job_is_finished_before_leaving_if_pixels_come_in_time(unrendered, expected_s, finishes):
    assert gates.will_finish(unrendered, expected_s, left_s=2.0) is finishes


def test_sweeper_ends_no_lease_until_workers_had_the_time_to_renew_after_an_outage():
    assert gates.may_end_leases(100.0, outage_noted_at=None, renew_s=5.0)
    assert not gates.may_end_leases(104.9, outage_noted_at=100.0, renew_s=5.0)
    assert gates.may_end_leases(105.0, outage_noted_at=100.0, renew_s=5.0)


@pytest.mark.parametrize(
    ("younger_by_s", "is_lost"),
    [(2.1, True), (2.0, False), (0, False), (-3, False)],
)
def test_message_is_lost_if_the_next_in_line_was_announced_clearly_later(younger_by_s, is_lost):
    next_at = AT + timedelta(seconds=younger_by_s)

    assert gates.was_overtaken(AT, next_announced_at=next_at) is is_lost


def test_queue_is_backed_up_above_two_hundred_messages():
    assert not gates.is_backed_up(200)
    assert gates.is_backed_up(201)


def test_pictures_are_asked_for_again_soon_if_nothing_waits_and_later_if_the_request_may_wait():
    assert gates.inputs_late_after_s(waiting=0) == 5.0
    assert gates.inputs_late_after_s(waiting=1) == 60.0


def test_job_is_unstorable_once_the_pixels_of_one_image_were_lost_five_times():
    assert not gates.is_unstorable(4)
    assert gates.is_unstorable(5)
