"""What the device does next: driven by hand, one piece of work at a time."""

import gc
import random
import subprocess
import sys
from collections import Counter

import pytest
from engine_builders import a_key, a_pinned_image, an_image, flat, ids, measured_costs, saturated
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.costs import CostModel
from engine.inflight import RenderState
from engine.owners import CREDIT_S, MAX_GONE, Owners
from engine.request import AdapterUse
from engine.scheduler import Batch, Decode, Encode, Scheduler, _Kind

SIZES = (64, 128, 192)


def a_scheduler(curve=flat, costs=None, **changes) -> Scheduler:
    """Every size costs the same, unless `costs` says otherwise."""
    return Scheduler(
        costs or measured_costs(curve, sizes=SIZES),
        **{"max_inflight": 8, "max_batch_rows": 16} | changes,
    )


def do(scheduler, work):
    """What the engine does with a piece of work, tensors aside."""
    if isinstance(work, Encode):
        work.image.state = RenderState.RUNNING
    elif isinstance(work, Batch):
        for image in work:
            image.count_step()
    scheduler.settle(work)
    if isinstance(work, Decode):
        scheduler.remove(work.image.id)


def step(scheduler, now_s=0.0) -> list[str]:
    """Do everything up to the next forward and this forward; the ids of its images."""
    while True:
        work = scheduler.next_work(now_s)
        do(scheduler, work)
        if isinstance(work, Batch):
            return ids(work)


def told(work) -> str:
    """A piece of work in words: "encode a", "denoise a b", "decode a"."""
    if isinstance(work, Batch):
        return "denoise " + " ".join(ids(work))
    return f"{type(work).__name__.lower()} {work.image.id}"


def turn(scheduler, now_s=0.0) -> str:
    """Do the next piece of work, whatever it is."""
    work = scheduler.next_work(now_s)
    do(scheduler, work)
    return told(work)


def turns(scheduler, count) -> list[str]:
    return [turn(scheduler) for _ in range(count)]


# --- who shares a forward -------------------------------------------------------------------------


def test_a_newcomer_joins_at_the_next_step_boundary():
    scheduler = a_scheduler()
    scheduler.add(an_image("early", num_steps=20), now_s=0)
    step(scheduler)

    scheduler.add(an_image("late", num_steps=40), now_s=1)

    assert step(scheduler) == ["early", "late"]


def test_an_empty_scheduler_has_no_work():
    assert a_scheduler().next_work(0) is None


def test_steps_guidance_samplers_and_seeds_share_a_forward():
    scheduler = a_scheduler()
    scheduler.add(an_image("a", num_steps=4, guidance=7.5, sampler="euler", seed=1), now_s=0)
    scheduler.add(an_image("b", num_steps=20, guidance=1.0, sampler="ddim", seed=2), now_s=0)

    batch = scheduler.next_work(0)

    assert ids(batch) == ["a", "b"]
    # two rows for the guided one, one for the other
    assert batch.bucket_rows == batch.used_rows == 3


def test_asked_again_before_anything_is_settled_it_says_the_same():
    scheduler = a_scheduler(max_inflight=3)
    for id, size in (("a", 64), ("b", 128), ("c", 64), ("d", 192)):
        scheduler.add(an_image(id, size=size, num_steps=3, encoded=id != "c"), now_s=0)

    for _ in range(20):
        work = scheduler.next_work(1)
        assert [scheduler.next_work(1) for _ in range(3)] == [work] * 3
        if work is not None:
            do(scheduler, work)

    assert len(scheduler) == 0


def test_a_batch_keeps_the_key_and_rows_of_its_making():
    image = an_image("a")
    batch = Batch.alone(image)

    image.batch_key, image.rows = a_key(call="another network"), 1

    assert (batch.key, batch.used_rows, batch.bucket_rows) == (a_key(), 2, 2)


def test_images_ride_with_those_whose_next_forward_has_their_key():
    scheduler = a_scheduler()
    for id in "abcd":
        scheduler.add(an_image(id), now_s=0)
    assert step(scheduler) == ["a", "b", "c", "d"]

    for id in "bd":
        scheduler.get(id).batch_key = a_key(call="another network")
    assert step(scheduler) == ["a", "c"]

    for id in "ac":
        scheduler.get(id).batch_key = a_key(call="another network")
    assert step(scheduler) == ["a", "c", "b", "d"]


# --- order ----------------------------------------------------------------------------------------


def test_short_remaining_work_goes_first():
    scheduler = a_scheduler(saturated)
    for id, num_steps in (("long", 30), ("short", 4), ("middle", 8)):
        scheduler.add(an_image(id, num_steps=num_steps), now_s=0)

    assert ids(scheduler.in_order()) == ["short", "middle", "long"]
    assert step(scheduler) == ["short"]


def test_remaining_counts_the_steps_left_not_those_asked_for():
    scheduler = a_scheduler(saturated)
    nearly_there = an_image("nearly there", num_steps=30)
    nearly_there.step = 28
    scheduler.add(nearly_there, now_s=0)
    scheduler.add(an_image("short", num_steps=4), now_s=0)

    assert step(scheduler) == ["nearly there"]


def test_remaining_counts_the_rows_of_the_pinned_bucket_the_encode_and_the_decode():
    scheduler = a_scheduler(saturated)  # a row takes a second, an encode 0.1 s, a decode 0.5 s
    scheduler.add(a_pinned_image("pinned", bucket_rows=8, num_steps=3), now_s=0)  # 24.5 s
    scheduler.add(an_image("encoded", num_steps=12), now_s=0)  # 24.5 s
    scheduler.add(an_image("queued", num_steps=12, encoded=False), now_s=0)  # 24.6 s
    scheduler.add(an_image("other size", num_steps=6, size=128, guidance=1.0), now_s=0)  # 6.5 s

    assert ids(scheduler.in_order()) == ["other size", "pinned", "encoded", "queued"]


def test_an_image_that_waited_long_enough_is_passed_by_no_newcomer():
    scheduler = a_scheduler(saturated, ageing=0.5)
    scheduler.add(an_image("long", num_steps=14, guidance=1.0), now_s=0)  # 14.5 s remaining

    # 4.5 s: ten less, as long as 20 s of ageing
    scheduler.add(an_image("in time", num_steps=4, guidance=1.0), now_s=19.9)
    scheduler.add(an_image("too late", num_steps=4, guidance=1.0), now_s=20.1)

    assert ids(scheduler.in_order()) == ["in time", "long", "too late"]
    scheduler.next_work(1000)
    assert ids(scheduler.in_order()) == ["in time", "long", "too late"]


def test_among_equals_the_first_to_arrive_goes_first_and_stays_ahead():
    scheduler = a_scheduler(max_batch_rows=4)
    for id in "abc":
        scheduler.add(an_image(id, num_steps=2), now_s=0)

    assert [step(scheduler) for _ in range(4)] == [["a", "b"], ["a", "b"], ["c"], ["c"]]


# --- ranks ----------------------------------------------------------------------------------------


def test_a_better_rank_goes_first():
    scheduler = a_scheduler(max_batch_rows=2)
    scheduler.add(an_image("bulk", rank=2, num_steps=2), now_s=0)
    step(scheduler)

    scheduler.add(an_image("interactive", rank=0, num_steps=9), now_s=0)

    assert [step(scheduler) for _ in range(10)] == [["interactive"]] * 9 + [["bulk"]]


def test_a_better_rank_of_another_size_goes_before_everything_else():
    scheduler = a_scheduler()
    scheduler.add(an_image("bulk", rank=1, num_steps=9), now_s=0)
    step(scheduler)

    scheduler.add(an_image("interactive", rank=0, size=128, num_steps=2), now_s=0)

    assert [step(scheduler) for _ in range(3)] == [["interactive"], ["interactive"], ["bulk"]]


def test_an_encode_of_a_better_rank_goes_before_a_forward_and_a_decode_of_a_worse():
    scheduler = a_scheduler()
    scheduler.add(an_image("done", rank=1, num_steps=1), now_s=0)
    scheduler.add(an_image("bulk", rank=1, num_steps=9), now_s=0)
    step(scheduler)

    scheduler.add(an_image("interactive", rank=0, num_steps=1, encoded=False), now_s=0)

    assert turns(scheduler, 5) == [
        "encode interactive",
        "denoise interactive",
        "decode interactive",
        "decode done",
        "denoise bulk",
    ]


def test_a_new_rank_counts_from_the_next_step_boundary():
    scheduler = a_scheduler(saturated)
    scheduler.add(an_image("a", num_steps=4), now_s=0)
    scheduler.add(an_image("b", num_steps=9), now_s=0)
    assert step(scheduler) == ["a"]

    scheduler.set_rank("a", 1)
    scheduler.set_rank("nobody", 1)

    assert step(scheduler) == ["b"]
    assert ids(scheduler.in_order()) == ["b", "a"]


def test_a_worse_rank_never_makes_a_forward_larger():
    scheduler = a_scheduler(flat)  # it would cost a hundredth
    scheduler.add(an_image("interactive", rank=0), now_s=0)
    scheduler.add(an_image("bulk", rank=1), now_s=0)

    assert step(scheduler) == ["interactive"]


@pytest.mark.parametrize(
    "interactive", [an_image("interactive"), a_pinned_image("interactive", bucket_rows=4)]
)
def test_a_worse_rank_rides_in_rows_that_are_padding_anyway(interactive):
    scheduler = a_scheduler(saturated, row_buckets=(1, 4))
    scheduler.add(interactive, now_s=0)
    for id in "abc":
        scheduler.add(an_image(id, rank=1), now_s=0)

    batch = scheduler.next_work(0)

    assert ids(batch) == ["interactive", "a"]
    assert batch.bucket_rows == 4


def test_free_rows_are_filled_with_guests_that_are_not_encoded_yet_where_their_encode_is_cheap():
    scheduler = a_scheduler(saturated)
    scheduler.add(a_pinned_image("interactive", bucket_rows=8), now_s=0)
    for id in "abcd":
        scheduler.add(a_pinned_image(id, bucket_rows=8, rank=1, encoded=False), now_s=0)

    assert step(scheduler) == ["interactive", "a", "b", "c"]


def test_free_rows_stay_empty_where_a_guest_s_encode_would_hold_up_the_forward():
    costs = measured_costs(saturated, sizes=SIZES)
    for _ in range(50):
        costs.observe_encode(a_key(), 5.0)
    scheduler = a_scheduler(costs=costs)
    scheduler.add(a_pinned_image("interactive", bucket_rows=8), now_s=0)
    scheduler.add(a_pinned_image("a", bucket_rows=8, rank=1, encoded=False), now_s=0)

    assert step(scheduler) == ["interactive"]


# --- shares ---------------------------------------------------------------------------------------


def an_urgent_and_a_patient_crowd(**changes) -> Scheduler:
    """Rank 0 always has work, and so has rank 1."""
    scheduler = a_scheduler(saturated, **changes)
    for rank in (0, 1):
        scheduler.add(an_image(f"rank {rank}", rank=rank, num_steps=10**6), now_s=0)
    return scheduler


def test_without_shares_a_worse_rank_waits_as_long_as_a_better_one_has_work():
    assert set(turns(an_urgent_and_a_patient_crowd(), 100)) == {"denoise rank 0"}


def test_a_rank_with_a_share_gets_a_turn_whenever_its_credit_covers_its_next_piece_of_work():
    scheduler = an_urgent_and_a_patient_crowd(rank_shares={1: 0.25})

    assert turns(scheduler, 10) == [
        *["denoise rank 0"] * 4,
        "denoise rank 1",
        *["denoise rank 0"] * 3,
        "denoise rank 1",
        "denoise rank 0",
    ]


def test_being_served_when_nobody_better_is_here_costs_no_credit_and_earns_none():
    scheduler = an_urgent_and_a_patient_crowd(rank_shares={1: 0.25})
    scheduler.remove("rank 0")
    turns(scheduler, 50)

    scheduler.add(an_image("rank 0", num_steps=99), now_s=0)

    assert turns(scheduler, 5) == [*["denoise rank 0"] * 4, "denoise rank 1"]


def test_a_patient_rank_is_put_off_at_first_and_then_has_its_whole_share():
    scheduler = an_urgent_and_a_patient_crowd(rank_shares={1: 0.25}, share_patience_s=8.0)

    done = turns(scheduler, 400)

    assert done[:8] == ["denoise rank 0"] * 8
    assert done[8] == "denoise rank 1"
    assert Counter(done[8:])["denoise rank 1"] == pytest.approx(0.25 * len(done[8:]), abs=1)


def test_a_rank_whose_work_came_to_an_end_need_not_be_patient_anew_for_the_next():
    scheduler = an_urgent_and_a_patient_crowd(rank_shares={1: 0.25}, share_patience_s=8.0)
    turns(scheduler, 9)  # the last of them was its own
    scheduler.remove("rank 1")
    turns(scheduler, 3)

    scheduler.add(an_image("rank 1", rank=1, num_steps=99), now_s=0)

    assert "denoise rank 1" in turns(scheduler, 5), "eight if it had to be"


def test_a_rank_without_work_earns_nothing_and_keeps_nothing():
    scheduler = an_urgent_and_a_patient_crowd(rank_shares={1: 0.25})
    turns(scheduler, 3)
    scheduler.remove("rank 1")
    turns(scheduler, 50)

    scheduler.add(an_image("rank 1", rank=1, num_steps=99), now_s=0)

    assert turns(scheduler, 5) == [*["denoise rank 0"] * 4, "denoise rank 1"]


def test_a_share_is_of_the_measured_seconds_though_they_come_late():
    scheduler = an_urgent_and_a_patient_crowd(rank_shares={1: 0.2})
    works, took = [], Counter()
    for _ in range(2000):
        works.append(scheduler.next_work(0))
        do(scheduler, works[-1])
        if len(works) > 2:
            late = works[-3].images[0].rank
            scheduler.charge(works[-3], [1.0, 4.0][late])
            took[late] += [1.0, 4.0][late]

    assert took[1] / took.total() == pytest.approx(0.2, rel=0.05)


def test_work_longer_than_a_minute_could_pay_for_is_not_put_off_for_ever():
    scheduler = a_scheduler(lambda rows: 10.0 * rows, rank_shares={1: 0.05})
    for rank in (0, 1):
        scheduler.add(an_image(f"rank {rank}", rank=rank, num_steps=99), now_s=0)

    assert turns(scheduler, 40).count("denoise rank 1") > 2


def test_in_a_turn_it_is_owed_a_rank_fills_its_forward_with_its_own_images_first():
    scheduler = a_scheduler(saturated, rank_shares={1: 0.5})
    for rank in (0, 1):
        for n in range(3):
            scheduler.add(
                a_pinned_image(f"{rank}-{n}", bucket_rows=8, rank=rank, num_steps=99), now_s=0
            )

    # It has a quarter of each forward as a guest, and so earns another quarter.
    assert [step(scheduler) for _ in range(5)] == [["0-0", "0-1", "0-2", "1-0"]] * 4 + [
        ["1-0", "1-1", "1-2", "0-0"]
    ]


def test_a_share_is_of_a_rank_s_own_rows_also_where_others_ride_in_its_forwards():
    scheduler = a_scheduler(saturated, rank_shares={1: 0.2})
    for n in range(4):
        scheduler.add(a_pinned_image(f"0-{n}", bucket_rows=8, rank=0, num_steps=10**6), now_s=0)
    scheduler.add(a_pinned_image("1-0", bucket_rows=8, rank=1, num_steps=10**6), now_s=0)

    forwards = [step(scheduler) for _ in range(400)]

    assert all(len(images) == 4 for images in forwards)
    assert sum("1-0" in images for images in forwards) / 4 == pytest.approx(0.2 * 400, abs=2)


def test_shares_that_change_are_kept_to_at_once_and_credit_stays():
    scheduler = an_urgent_and_a_patient_crowd(rank_shares={1: 0.25})
    turns(scheduler, 3)

    scheduler.set_shares({1: 0.25, 2: 0.1})
    goes_on = turns(scheduler, 2)
    scheduler.set_shares({})

    assert goes_on == ["denoise rank 0", "denoise rank 1"], "four seconds of credit, not one"
    assert set(turns(scheduler, 20)) == {"denoise rank 0"}


@pytest.mark.parametrize("rank_shares", [{1: 0.0}, {1: -0.1}, {1: 0.5, 2: 0.5}, {1: float("nan")}])
def test_shares_that_are_no_parts_of_a_whole_are_refused(rank_shares):
    with pytest.raises(ValueError, match="rank_shares"):
        a_scheduler(rank_shares=rank_shares)
    with pytest.raises(ValueError, match="rank_shares"):
        a_scheduler().set_shares(rank_shares)


# --- owners ---------------------------------------------------------------------------------------


def a_dump(scheduler, count=8, before=20, **changes):
    """Somebody's many images, of which `before` seconds have been rendered."""
    for n in range(count):
        scheduler.add(an_image(f"dump {n}", owner="dump", num_steps=10, **changes), now_s=0)
    for _ in range(before):
        step(scheduler)


def test_an_owner_s_only_image_goes_before_the_many_of_an_owner_that_had_more():
    scheduler = a_scheduler(saturated)
    a_dump(scheduler)

    scheduler.add(an_image("light", owner="light", num_steps=15, guidance=1.0), now_s=0)

    seen = turns(scheduler, 17)
    assert seen[:16] == ["denoise light"] * 15 + ["decode light"]
    assert " dump " in seen[16]


def test_the_images_of_who_is_ahead_ride_with_the_others_in_free_rows_only():
    scheduler = a_scheduler(flat, row_buckets=(4, 16))
    a_dump(scheduler, count=40)

    scheduler.add(an_image("light", owner="light"), now_s=0)
    batch = scheduler.next_work(0)

    assert (batch.images[0].id, len(batch), batch.bucket_rows) == ("light", 2, 4)


def test_the_images_of_who_is_ahead_take_seats_after_those_of_the_others():
    scheduler = a_scheduler(saturated, max_inflight=2)
    a_dump(scheduler)

    for id in "abc":
        scheduler.add(an_image(id, owner="light", num_steps=30), now_s=0)
    scheduler.next_work(0)

    assert [image.id for image in scheduler.in_order() if image.state is RenderState.RUNNING] == [
        "a",
        "b",
    ]


def test_two_owners_who_both_have_many_images_get_the_same_seconds():
    scheduler = a_scheduler(saturated, max_inflight=4)
    for n in range(100):
        scheduler.add(an_image(f"few steps {n}", owner="quick", num_steps=4), now_s=0)
        scheduler.add(an_image(f"many steps {n}", owner="slow", num_steps=12), now_s=0)

    seen = Counter(told.split()[1] for told in turns(scheduler, 400) if told.startswith("denoise"))

    assert seen["few"] == pytest.approx(seen["many"], rel=0.15)


def test_with_an_image_each_nobody_is_ahead_and_the_order_is_as_ever():
    scheduler, plain = a_scheduler(saturated), a_scheduler(saturated)
    rng = random.Random(1)
    for n in range(40):
        num_steps = rng.choice([4, 8, 30])
        scheduler.add(an_image(str(n), owner=f"owner {n}", num_steps=num_steps), now_s=n)
        plain.add(an_image(str(n), num_steps=num_steps), now_s=n)
        assert [turn(scheduler, n) for _ in range(3)] == [turn(plain, n) for _ in range(3)]


def test_an_owner_alone_in_its_rank_is_never_ahead():
    scheduler = a_scheduler(saturated)
    a_dump(scheduler, before=60)

    scheduler.add(an_image("another rank", owner="other", rank=1), now_s=0)
    scheduler.next_work(0)

    assert not any(ticket.owner.is_ahead for ticket in scheduler._tickets.values())


def test_an_owner_that_comes_back_at_once_is_not_taken_for_a_newcomer():
    scheduler = a_scheduler(saturated)
    a_dump(scheduler, count=40)
    served = []
    for n in range(40):
        scheduler.add(an_image(f"serial {n}", owner="serial", num_steps=10), now_s=0)
        while f"serial {n}" in scheduler:
            served.append(turn(scheduler).split()[1])

    assert 0.4 < served.count("serial") / len(served) < 0.7  # its credit at first, then half


def test_a_new_rank_is_a_new_comparison():
    scheduler = a_scheduler(saturated)
    a_dump(scheduler)
    scheduler.add(an_image("light", owner="light", num_steps=99, rank=1), now_s=0)

    scheduler.set_rank("light", 0)

    assert turn(scheduler) == "denoise light"


def test_of_owners_that_left_little_is_remembered():
    scheduler = a_scheduler(saturated)
    scheduler.add(an_image("stays", owner="stays", num_steps=10**6), now_s=0)
    for n in range(1000):
        scheduler.add(an_image(str(n), owner=f"owner {n}", num_steps=1), now_s=0)
        turns(scheduler, 2)
    remembered = len(scheduler._owners[0]._gone)
    for id in [image.id for image in scheduler.in_order()]:
        scheduler.remove(id)

    assert remembered <= 256
    assert scheduler._owners == {}


def test_of_owners_that_left_those_who_left_first_are_forgotten():
    owners = Owners()
    owners.enter("stays", 1.0)
    for n in range(MAX_GONE + 2):
        owners.enter(f"owner {n}", 1.0).attained_s = 500.0
        owners.leave(f"owner {n}")

    back = {n: owners.enter(f"owner {n}", 1.0).attained_s for n in (0, 1, 2, MAX_GONE + 1)}

    assert back == {0: -CREDIT_S, 1: -CREDIT_S, 2: 500.0, MAX_GONE + 1: 500.0}


# --- seats ----------------------------------------------------------------------------------------


def test_no_more_images_than_seats_advance():
    scheduler = a_scheduler(max_inflight=2)
    for id in "abc":
        scheduler.add(an_image(id), now_s=0)

    assert step(scheduler) == ["a", "b"]


def test_a_better_rank_parks_a_seated_image_which_comes_back_with_its_steps():
    scheduler = a_scheduler(max_inflight=1)
    bulk = an_image("bulk", rank=2, num_steps=9)
    scheduler.add(bulk, now_s=0)
    step(scheduler)

    scheduler.add(an_image("interactive", rank=0, num_steps=1), now_s=0)

    assert step(scheduler) == ["interactive"]
    assert (bulk.step, bulk.state) == (1, RenderState.PARKED)
    assert (ids(scheduler.take_parked()), ids(scheduler.take_resumed())) == (["bulk"], [])
    assert step(scheduler) == ["bulk"]
    assert (bulk.step, bulk.state) == (2, RenderState.RUNNING)
    assert (ids(scheduler.take_parked()), ids(scheduler.take_resumed())) == ([], ["bulk"])
    assert (scheduler.take_parked(), scheduler.take_resumed()) == ([], [])


def test_a_seat_goes_to_a_much_shorter_newcomer_and_not_to_a_slightly_shorter_one():
    scheduler = a_scheduler(max_inflight=1)
    scheduler.add(an_image("seated", num_steps=20), now_s=0)
    step(scheduler)

    scheduler.add(an_image("slightly shorter", num_steps=16), now_s=0)
    assert step(scheduler) == ["seated"]

    scheduler.add(an_image("much shorter", num_steps=4), now_s=0)
    assert step(scheduler) == ["much shorter"]
    # it was encoded too, and has had no seat yet
    assert ids(scheduler.take_parked()) == ["slightly shorter", "seated"]


def test_an_image_not_encoded_gives_its_seat_to_a_shorter_one_without_being_parked():
    scheduler = a_scheduler(max_inflight=1)
    scheduler.add(an_image("long", num_steps=20, encoded=False), now_s=0)
    scheduler.next_work(0)

    scheduler.add(an_image("shorter", num_steps=19, encoded=False), now_s=0)

    assert turn(scheduler) == "encode shorter"
    assert scheduler.take_parked() == []
    assert scheduler.get("long").state is RenderState.QUEUED


def test_a_removed_image_is_not_told_of_as_parked():
    scheduler = a_scheduler(max_inflight=1)
    scheduler.add(an_image("bulk", rank=1), now_s=0)
    scheduler.add(an_image("interactive", rank=0), now_s=0)
    scheduler.next_work(0)

    scheduler.remove("bulk")

    assert scheduler.take_parked() == []


def test_a_removed_image_is_not_told_of_as_resumed():
    scheduler = a_scheduler(max_inflight=1)
    scheduler.add(an_image("bulk", rank=1), now_s=0)
    scheduler.add(an_image("interactive", rank=0), now_s=0)
    scheduler.next_work(0)
    scheduler.remove("interactive")
    scheduler.next_work(0)

    scheduler.remove("bulk")

    assert scheduler.take_resumed() == []


def test_an_image_waiting_for_decode_holds_no_seat():
    scheduler = a_scheduler(max_inflight=1)
    scheduler.add(an_image("done", num_steps=1), now_s=0)
    scheduler.add(an_image("next"), now_s=0)
    step(scheduler)

    assert scheduler.next_work(0) == Decode(scheduler.get("done"))
    assert scheduler.get("next").state is RenderState.RUNNING


def test_a_lane_of_long_work_has_a_seat_though_shorter_images_of_another_would_fill_them_all():
    scheduler = a_scheduler(max_inflight=4)
    for id in "abcdef":
        scheduler.add(an_image(id, num_steps=2), now_s=0)
    scheduler.add(an_image("odd", size=128, num_steps=30), now_s=0)

    assert [step(scheduler) for _ in range(2)] == [["a", "b", "c"], ["odd"]]


def test_no_more_than_half_of_the_seats_go_to_lanes_of_a_single_image():
    scheduler = a_scheduler(max_inflight=4, costs=measured_costs(flat, sizes=range(64, 72)))
    for size in range(65, 72):
        scheduler.add(an_image(f"odd {size}", size=size, num_steps=30), now_s=0)
    for id in "abcdef":
        scheduler.add(an_image(id, num_steps=2), now_s=0)

    assert [step(scheduler) for _ in range(2)] == [["a", "b", "c"], ["odd 65"]]


def test_an_image_parked_twice_keeps_the_seat_it_regains_beside_the_others():
    scheduler = a_scheduler(saturated, max_inflight=1)
    bulk = an_image("bulk", rank=2, num_steps=9)
    scheduler.add(bulk, now_s=0)
    parks = 0
    for n in range(2):
        step(scheduler)
        scheduler.add(an_image(f"urgent {n}", rank=0, num_steps=1), now_s=0)
        turns(scheduler, 2)
        parks += len(scheduler.take_parked())
    step(scheduler)
    assert (parks, bulk.state) == (2, RenderState.RUNNING)

    scheduler.add(an_image("urgent", rank=0, num_steps=1), now_s=0)

    # a seat says nothing of turns
    assert turns(scheduler, 3) == ["denoise urgent", "decode urgent", "denoise bulk"]
    assert scheduler.take_parked() == []


@pytest.mark.parametrize("max_inflight", [1, 2, 16])
def test_seats_are_kept_for_every_rank_with_a_share_and_for_the_best_image(
    max_inflight,
):
    scheduler = a_scheduler(saturated, max_inflight=max_inflight, rank_shares={1: 0.15, 2: 0.05})
    for rank in (2, 1, 0):
        for n in range(30):
            scheduler.add(an_image(f"{rank}-{n}", rank=rank, num_steps=99), now_s=0)
    scheduler.next_work(0)

    seats = Counter(
        image.rank for image in scheduler.in_order() if image.state is RenderState.RUNNING
    )

    assert (
        seats
        == {1: {0: 1, 1: 1, 2: 1}, 2: {0: 1, 1: 1, 2: 1}, 16: {0: 13, 1: 2, 2: 1}}[max_inflight]
    )


@pytest.mark.parametrize("seed", range(5))
def test_nobody_is_parked_or_resumed_while_nobody_comes_or_goes_however_the_costs_waver(seed):
    rng = random.Random(seed)
    costs = measured_costs(flat, sizes=SIZES)
    scheduler = a_scheduler(costs=costs, max_inflight=3)
    for n in range(9):
        scheduler.add(
            an_image(str(n), size=rng.choice(SIZES), num_steps=1000 + rng.randrange(3)), now_s=0
        )
    scheduler.next_work(0)
    scheduler.take_parked()

    for _ in range(300):
        work = scheduler.next_work(0)
        do(scheduler, work)
        scheduler.charge(work, work.predicted_s * rng.uniform(0.1, 3))

        assert (scheduler.take_parked(), scheduler.take_resumed()) == ([], [])


@pytest.mark.parametrize("seed", range(5))
def test_two_images_that_cost_about_the_same_do_not_swap_seats_at_every_arrival(seed):
    rng = random.Random(seed)
    costs = measured_costs(flat, sizes=SIZES)
    scheduler = a_scheduler(costs=costs, max_inflight=1)
    for size in (64, 128):
        scheduler.add(an_image(f"long {size}", size=size, num_steps=1000), now_s=0)

    moves = 0
    for n in range(300):
        scheduler.add(an_image(f"hopeless {n}", num_steps=5000), now_s=0)
        work = scheduler.next_work(0)
        do(scheduler, work)
        scheduler.charge(work, flat(2) * rng.uniform(0.8, 1.2))
        moves += len(scheduler.take_resumed())

    assert moves == 0


# --- encode and decode ----------------------------------------------------------------------------


def test_prompts_are_encoded_in_order_before_the_forward_their_images_ride_in():
    scheduler = a_scheduler()
    for id, rank, num_steps in (("a", 1, 9), ("b", 1, 4), ("c", 0, 9)):
        scheduler.add(an_image(id, rank=rank, num_steps=num_steps, encoded=False), now_s=0)

    assert turns(scheduler, 2) == ["encode c", "denoise c"]
    scheduler.remove("c")
    assert turns(scheduler, 3) == ["encode b", "encode a", "denoise b a"]


def test_newcomers_hold_up_who_is_ready_by_a_few_encodes_at_most():
    scheduler = a_scheduler(max_encodes_between_steps=2, max_inflight=16)
    scheduler.add(an_image("ready", num_steps=3), now_s=0)
    for id in "abc":
        scheduler.add(an_image(id, num_steps=9, encoded=False), now_s=0)

    assert turns(scheduler, 5) == [
        "encode a",
        "encode b",
        "denoise ready a b",
        "encode c",
        "denoise ready a b c",
    ]


def test_with_nobody_ready_everybody_who_would_ride_is_encoded_first():
    scheduler = a_scheduler(max_encodes_between_steps=1)
    for id in "abc":
        scheduler.add(an_image(id, encoded=False), now_s=0)

    assert turns(scheduler, 4) == ["encode a", "denoise a", "encode b", "denoise a b"]


def test_an_image_that_would_not_ride_is_not_encoded():
    scheduler = a_scheduler(saturated)
    scheduler.add(an_image("short", num_steps=2), now_s=0)
    scheduler.add(an_image("long", num_steps=9, encoded=False), now_s=0)

    assert turns(scheduler, 4) == ["denoise short", "denoise short", "decode short", "encode long"]


def test_a_shorter_newcomer_is_encoded_at_once():
    scheduler = a_scheduler(saturated)
    scheduler.add(an_image("long", num_steps=9), now_s=0)
    step(scheduler)

    scheduler.add(an_image("short", num_steps=2, encoded=False), now_s=0)

    assert turns(scheduler, 5) == [
        "encode short",
        "denoise short",
        "denoise short",
        "decode short",
        "denoise long",
    ]


def test_an_image_that_needs_no_step_after_its_encode_goes_to_decode():
    scheduler = a_scheduler()
    image = an_image("a", num_steps=4, encoded=False)
    scheduler.add(image, now_s=0)
    work = scheduler.next_work(0)

    image.step, image.is_denoised = 4, True
    do(scheduler, work)

    assert turn(scheduler) == "decode a"


def test_settling_the_last_step_hands_the_image_to_decode():
    scheduler = a_scheduler()
    scheduler.add(an_image("short", num_steps=1), now_s=0)
    scheduler.add(an_image("long", num_steps=2), now_s=0)

    assert turns(scheduler, 4) == [
        "denoise short long",
        "decode short",
        "denoise long",
        "decode long",
    ]
    assert scheduler.next_work(0) is None


def test_decoding_comes_before_the_next_forward_of_its_rank_the_longest_wait_first():
    scheduler = a_scheduler()
    for id, now_s in (("a", 0), ("b", 1), ("c", 2)):
        scheduler.add(an_image(id, num_steps=1), now_s=now_s)
    scheduler.add(an_image("long", num_steps=2), now_s=0)

    assert turns(scheduler, 5) == [
        "denoise a b c long",
        "decode a",
        "decode b",
        "decode c",
        "denoise long",
    ]


def test_decodes_between_two_forwards_can_be_limited():
    scheduler = a_scheduler(max_decodes_between_steps=1)
    for id in "ab":
        scheduler.add(an_image(id, num_steps=1), now_s=0)
    scheduler.add(an_image("long", num_steps=2), now_s=0)

    assert turns(scheduler, 5) == [
        "denoise a b long",
        "decode a",
        "denoise long",
        "decode b",
        "decode long",
    ]


def test_decodes_between_two_forwards_are_limited_anew_after_each_forward():
    scheduler = a_scheduler(max_decodes_between_steps=1)
    for id in "abc":
        scheduler.add(an_image(id, num_steps=1), now_s=0)
    scheduler.add(an_image("long", num_steps=4), now_s=0)

    step(scheduler)

    forward = "denoise long"
    assert turns(scheduler, 5) == ["decode a", forward, "decode b", forward, "decode c"]


def test_a_decoded_image_is_not_offered_again_while_it_is_still_here():
    scheduler = a_scheduler()
    scheduler.add(an_image("a", num_steps=1), now_s=0)
    step(scheduler)

    scheduler.settle(scheduler.next_work(0))

    assert scheduler.next_work(0) is None
    assert "a" in scheduler


# --- lanes ----------------------------------------------------------------------------------------


def test_sizes_do_not_share_a_forward_and_take_turns():
    scheduler = a_scheduler()
    for id, size in (("a", 64), ("b", 128), ("c", 192)):
        scheduler.add(an_image(id, size=size, num_steps=9), now_s=0)

    assert [step(scheduler) for _ in range(6)] == [["a"], ["b"], ["c"], ["a"], ["b"], ["c"]]


def test_an_expensive_size_gets_fewer_turns_not_more_seconds():
    costs = CostModel()
    for size, seconds in ((64, 1.0), (128, 4.0)):
        costs.observe_step(a_key(size), 2, seconds)
    scheduler = a_scheduler(costs=costs)
    for id, size in (("cheap", 64), ("expensive", 128)):
        scheduler.add(an_image(id, size=size, num_steps=99), now_s=0)

    seen = [step(scheduler) for _ in range(50)]

    assert seen.count(["cheap"]) == 40
    assert seen[:10] == [["cheap"]] * 4 + [["expensive"]] + [["cheap"]] * 4 + [["expensive"]]


def test_a_lane_pays_what_was_measured_though_the_measurement_comes_some_turns_later():
    scheduler = a_scheduler()
    for id, size in (("quick", 64), ("slow", 128)):
        scheduler.add(an_image(id, size=size, num_steps=99), now_s=0)
    before = [step(scheduler) for _ in range(2)]

    works = []
    for _ in range(40):
        works.append(scheduler.next_work(0))
        do(scheduler, works[-1])
        if len(works) > 3:
            late = works[-4]
            scheduler.charge(late, flat(2) * (3 if late.key == a_key(128) else 1))

    assert before == [["quick"], ["slow"]]
    slow = sum(work.key == a_key(128) for work in works)
    assert 8 <= slow <= 12  # a quarter of the turns, three times as long each


def test_a_lane_is_charged_for_its_encodes_and_decodes_too():
    scheduler = a_scheduler(costs=measured_costs(flat, sizes=SIZES, decode_s=flat(2)))
    scheduler.add(an_image("few steps", num_steps=9), now_s=0)
    for n in range(9):
        scheduler.add(an_image(f"one step {n}", size=128, num_steps=1), now_s=0)
    scheduler.cap_rows(a_key(128), 2)

    seen = turns(scheduler, 12)

    # two forwards for each forward and decode of the other lane
    assert seen.count("denoise few steps") == 6


def test_an_odd_size_is_not_starved_by_a_stream_of_newcomers():
    scheduler = a_scheduler(max_inflight=4)
    scheduler.add(an_image("odd", size=192, num_steps=3), now_s=0)
    seen = []
    for n in range(8):
        scheduler.add(an_image(f"usual {n}", num_steps=2), now_s=n)
        seen += step(scheduler, now_s=n)

    assert seen.count("odd") == 3


def test_the_forwards_of_a_pipeline_count_for_the_lane_it_arrived_in_whatever_their_keys():
    scheduler = a_scheduler(saturated)
    for n in range(4):
        scheduler.add(an_image(f"pipeline {n}", num_steps=99), now_s=0)
        scheduler.get(f"pipeline {n}").batch_key = a_key(call=f"alone {n}")
    scheduler.add(an_image("usual", size=128, num_steps=99), now_s=0)

    assert [step(scheduler) for _ in range(20)].count(["usual"]) == 10


def test_a_lane_that_waited_for_nothing_comes_back_without_credit():
    scheduler = a_scheduler()
    scheduler.add(an_image("a", num_steps=99), now_s=0)
    scheduler.add(an_image("b", size=128, num_steps=1), now_s=0)
    for _ in range(30):
        step(scheduler)

    scheduler.add(an_image("b again", size=128, num_steps=30), now_s=0)

    assert [step(scheduler) for _ in range(20)].count(["b again"]) in (10, 11)


def test_each_rank_has_turns_of_its_own():
    scheduler = a_scheduler()
    for id, size in (("a", 64), ("b", 128)):
        scheduler.add(an_image(id, size=size, rank=1, num_steps=9), now_s=0)
    scheduler.add(an_image("interactive", rank=0, num_steps=6), now_s=0)
    for _ in range(6):
        assert step(scheduler) == ["interactive"]

    # a's size owes nothing for the better rank
    assert [step(scheduler) for _ in range(4)] == [["a"], ["b"], ["a"], ["b"]]


# --- pinned buckets -------------------------------------------------------------------------------


def test_a_pinned_image_alone_still_gets_its_whole_bucket():
    for guidance, rows in ((4.0, 2), (1.0, 1)):
        scheduler = a_scheduler()
        scheduler.add(a_pinned_image("pinned", bucket_rows=8, guidance=guidance), now_s=0)

        batch = scheduler.next_work(0)

        assert (batch.used_rows, batch.bucket_rows, batch.is_pinned) == (rows, 8, True)


def test_a_pinned_bucket_of_eight_holds_four_guided_images_though_growth_would_not_pay():
    scheduler = a_scheduler(saturated)
    for id in "abcde":
        scheduler.add(a_pinned_image(id, bucket_rows=8, num_steps=1), now_s=0)

    assert [step(scheduler) for _ in range(2)] == [["a", "b", "c", "d"], ["e"]]


def test_spare_rows_of_a_bucket_are_lent_to_best_effort_images():
    scheduler = a_scheduler(saturated)
    scheduler.add(an_image("free", num_steps=30), now_s=0)
    scheduler.add(a_pinned_image("pinned", bucket_rows=4, num_steps=2), now_s=0)

    batch = scheduler.next_work(0)

    assert ids(batch) == ["pinned", "free"]
    assert batch.bucket_rows == 4


def test_different_buckets_never_meet_and_take_turns():
    scheduler = a_scheduler(lambda rows: 1.0)
    scheduler.add(a_pinned_image("eight", bucket_rows=8, num_steps=9), now_s=0)
    scheduler.add(a_pinned_image("four", bucket_rows=4, num_steps=9), now_s=0)

    batches = []
    for _ in range(4):
        batches.append(scheduler.next_work(0))
        do(scheduler, batches[-1])

    assert [(ids(batch), batch.bucket_rows) for batch in batches] == [
        (["eight"], 8),
        (["four"], 4),
    ] * 2


def test_a_pinned_image_never_rides_in_a_best_effort_forward():
    scheduler = a_scheduler()
    scheduler.add(an_image("free", num_steps=1), now_s=0)
    scheduler.add(a_pinned_image("pinned", bucket_rows=2, num_steps=9), now_s=0)

    assert step(scheduler) == ["free"]


def test_best_effort_images_beyond_the_bucket_get_turns_of_their_own():
    scheduler = a_scheduler(lambda rows: 1.0)
    scheduler.add(a_pinned_image("pinned", bucket_rows=4, num_steps=9), now_s=0)
    for id in "abc":
        scheduler.add(an_image(id, num_steps=9), now_s=0)

    seen = [set(step(scheduler)) for _ in range(8)]

    assert seen.count({"pinned", "a"}) == seen.count({"a", "b", "c"}) == 4


# --- growth ---------------------------------------------------------------------------------------


def rows_of_forward(scheduler, images) -> tuple[int, int]:
    """Used and padded rows of the next forward."""
    for image in images:
        scheduler.add(image, now_s=0)
    batch = scheduler.next_work(0)
    return batch.used_rows, batch.bucket_rows


def singles(count: int):
    """Images of one row each."""
    return [an_image(f"single {n}", guidance=1.0) for n in range(count)]


def test_a_forward_grows_to_the_row_limit_where_rows_are_nearly_free():
    assert rows_of_forward(a_scheduler(flat, max_inflight=32), singles(32)) == (16, 16)


def test_a_forward_stays_with_its_first_image_where_rows_gain_nothing():
    assert rows_of_forward(a_scheduler(saturated), singles(8)) == (1, 1)


def test_a_forward_grows_up_to_the_knee():
    assert rows_of_forward(a_scheduler(lambda rows: max(2.0, rows / 2)), singles(8)) == (8, 8)
    assert rows_of_forward(a_scheduler(lambda rows: 1 + max(0, rows - 4)), singles(8)) == (4, 4)


def test_a_forward_is_divided_where_several_do_its_images_sooner():
    steep = {1: 1.0, 2: 1.2, 4: 1.6, 8: 4.8, 16: 11.2}
    costs = measured_costs(steep.get, rows=steep)

    assert rows_of_forward(a_scheduler(costs=costs), singles(16)) == (4, 4)
    assert rows_of_forward(a_scheduler(costs=costs), singles(5)) == (5, 5), "4 + 1 take longer"
    always = a_scheduler(costs=costs, growth_ceiling=1e9)
    assert rows_of_forward(always, singles(8)) == (8, 8), "whatever it costs"
    padded = a_scheduler(costs=costs, row_buckets=(4, 8, 16))
    assert rows_of_forward(padded, singles(7)) == (4, 4)


def test_a_jump_of_the_curve_is_crossed_when_enough_wait_behind_it():
    def tiles_of_four(rows):
        return float(-(-rows // 4))

    costs = measured_costs(tiles_of_four, rows=range(1, 17))

    assert rows_of_forward(a_scheduler(costs=costs), singles(5)) == (4, 4)
    assert rows_of_forward(a_scheduler(costs=costs), singles(6)) == (6, 6)


def test_the_ceiling_can_be_set():
    def four_fifths_a_row(rows):
        return 1 + 0.8 * (rows - 1)

    assert rows_of_forward(a_scheduler(four_fifths_a_row), singles(8)) == (8, 8)
    assert rows_of_forward(a_scheduler(four_fifths_a_row, growth_ceiling=0.75), singles(8)) == (
        1,
        1,
    )


def test_no_forward_has_more_rows_than_allowed_but_small_images_fill_the_gap():
    scheduler = a_scheduler(max_batch_rows=5)
    for id, guidance, num_steps in (("a", 4.0, 4), ("b", 4.0, 4), ("c", 4.0, 4), ("d", 1.0, 9)):
        scheduler.add(an_image(id, guidance=guidance, num_steps=num_steps), now_s=0)

    batch = scheduler.next_work(0)

    assert ids(batch) == ["a", "b", "d"]
    assert batch.used_rows == 5


def test_a_best_effort_image_alone_is_not_padded_without_row_buckets():
    assert rows_of_forward(a_scheduler(), [an_image("free")]) == (2, 2)


def test_row_buckets_pad_a_best_effort_forward_to_the_smallest_that_holds_it():
    assert rows_of_forward(a_scheduler(row_buckets=(1, 4, 8)), [an_image("free")]) == (2, 4)
    assert rows_of_forward(a_scheduler(row_buckets=(1, 4, 8)), singles(5)) == (5, 8)
    assert rows_of_forward(a_scheduler(row_buckets=(1,)), [an_image("free")]) == (2, 2)


def test_rows_up_to_the_bucket_are_free_and_growth_into_the_next_one_pays_for_its_padding():
    def one_image_more(rows):
        return {1: 1.0, 2: 2.0, 4: 4.0, 8: 6.0, 16: 14.0}[rows]

    costs = measured_costs(one_image_more)
    buckets = {"row_buckets": (4, 8, 16), "costs": costs}

    assert rows_of_forward(a_scheduler(**buckets), singles(4)) == (4, 4)
    assert rows_of_forward(a_scheduler(**buckets), singles(6)) == (4, 4)  # two seconds for two rows
    assert rows_of_forward(a_scheduler(**buckets), singles(7)) == (7, 8)  # two seconds for three
    assert rows_of_forward(a_scheduler(**buckets, max_inflight=16), singles(16)) == (8, 8)


def test_an_image_of_more_rows_than_the_devices_cap_still_runs_alone():
    scheduler = a_scheduler()
    for id in "ab":
        scheduler.add(an_image(id), now_s=0)
    scheduler.cap_rows(a_key(), 1)

    assert step(scheduler) == ["a"]


def test_after_out_of_memory_no_forward_of_the_key_has_more_rows_than_the_cap_padding_included():
    scheduler = a_scheduler(row_buckets=(1, 2, 4, 8, 16))
    scheduler.cap_rows(a_key(), 6)
    scheduler.cap_rows(a_key(), 12)  # a cap is never lifted

    assert rows_of_forward(scheduler, singles(8)) == (4, 4)


def test_a_forward_has_no_more_rows_than_fit_into_memory_beside_one_decode():
    costs = measured_costs(flat)
    costs.observe_memory(a_key(), fixed_bytes=1000, per_row_bytes=100, decode_bytes=350)
    scheduler = a_scheduler(costs=costs)
    scheduler.memory_budget_bytes = 1700

    assert rows_of_forward(scheduler, singles(8)) == (3, 3)


def test_a_forward_holds_only_so_many_adapters_and_images_without_any_still_join():
    scheduler = a_scheduler(max_adapters=2)
    for id, names in (("a", ["x"]), ("b", ["y", "x"]), ("c", ["z"]), ("d", []), ("e", ["x"])):
        scheduler.add(an_image(id, adapters=tuple(AdapterUse(name) for name in names)), now_s=0)

    assert step(scheduler) == ["a", "b", "d", "e"]


def test_growth_is_decided_by_what_is_charged():
    scheduler = a_scheduler(flat)
    for id in "ab":
        scheduler.add(an_image(id, num_steps=400), now_s=0)
    seen = []

    for _ in range(300):
        work = scheduler.next_work(0)
        do(scheduler, work)
        scheduler.charge(work, saturated(work.bucket_rows))
        seen.append(work.bucket_rows)

    assert seen[0] == 4
    assert seen[-100:] == [2] * 100


# --- coming and going -----------------------------------------------------------------------------


def test_a_removed_image_is_in_no_later_batch_and_settling_ignores_it():
    scheduler = a_scheduler()
    for id in "ab":
        scheduler.add(an_image(id, num_steps=2), now_s=0)
    batch = scheduler.next_work(0)

    scheduler.remove("a")
    scheduler.remove("a")
    do(scheduler, batch)

    assert step(scheduler) == ["b"]
    assert len(scheduler) == 1
    assert scheduler.get("a") is None


def test_two_images_cannot_have_one_id():
    scheduler = a_scheduler()
    scheduler.add(an_image("a"), now_s=0)

    with pytest.raises(ValueError, match="already here"):
        scheduler.add(an_image("a"), now_s=0)


@pytest.mark.parametrize(
    "limits",
    [
        {"max_inflight": 0},
        {"max_batch_rows": 0},
        {"max_encodes_between_steps": 0},
        {"row_buckets": (4, 2)},
    ],
)
def test_limits_that_make_no_sense_are_refused(limits):
    with pytest.raises(ValueError, match=r"at least 1|not ascending"):
        a_scheduler(**limits)


def test_nothing_is_kept_of_keys_that_were_one_images_own():
    scheduler = a_scheduler()
    for n in range(300):
        scheduler.add(an_image(str(n), num_steps=2), now_s=n)
        scheduler.get(str(n)).batch_key = a_key(call=f"alone {n}")
        for _ in range(3):
            work = scheduler.next_work(n)
            do(scheduler, work)
            scheduler.charge(work, 1.0)

    assert len(scheduler) == 0
    del work
    assert sum(type(thing) is _Kind for thing in gc.get_objects()) < 20


# --- whatever happens -----------------------------------------------------------------------------

a_wish = st.fixed_dictionaries(
    {
        "size": st.sampled_from(SIZES),
        "num_steps": st.integers(1, 6),
        "rank": st.integers(0, 2),
        "owner": st.sampled_from(["", "", "other"]),
        "guidance": st.sampled_from([1.0, 4.0]),
        "encoded": st.booleans(),
        "bucket_rows": st.sampled_from([None, 2, 4]),
        "adapters": st.sampled_from(
            [(), (AdapterUse("x"),), (AdapterUse("y"),), (AdapterUse("x"), AdapterUse("z"))]
        ),
    }
)


def wished(id, bucket_rows, **changes):
    return (
        an_image(id, **changes)
        if bucket_rows is None
        else a_pinned_image(id, bucket_rows, **changes)
    )


@settings(max_examples=150, deadline=None)
@given(
    wishes=st.lists(a_wish, min_size=1, max_size=14),
    seed=st.integers(0, 2**16),
    curve=st.sampled_from([flat, saturated, lambda rows: 1 + rows / 2]),
    row_buckets=st.sampled_from([(), (2, 4, 8)]),
    max_inflight=st.integers(1, 6),
    shares=st.sampled_from([{}, {1: 0.2, 2: 0.1}]),
)
def test_whatever_comes_goes_or_is_moved_limits_hold_and_everybody_is_served(
    wishes, seed, curve, row_buckets, max_inflight, shares
):
    rng = random.Random(seed)
    limits = {
        "max_inflight": max_inflight,
        "max_batch_rows": 6,
        "max_adapters": 2,
        "row_buckets": row_buckets,
        "rank_shares": shares,
    }
    scheduler, parks = a_scheduler(curve, **limits), Counter()
    waiting, finished, removed, encodes, turns_left = list(enumerate(wishes)), set(), set(), 0, 2000

    while turns_left and (waiting or len(scheduler)):
        turns_left -= 1
        while waiting and rng.random() < 0.3:
            n, wish = waiting.pop()
            scheduler.add(wished(str(n), **wish), now_s=2000 - turns_left)
        if len(scheduler) and rng.random() < 0.05:
            scheduler.set_rank(rng.choice(scheduler.in_order()).id, rng.randrange(3))
        if len(scheduler) and rng.random() < 0.02:
            gone = rng.choice(scheduler.in_order()).id
            scheduler.remove(gone)
            removed.add(gone)
        work = scheduler.next_work(2000 - turns_left)
        assert (work is None) == (len(scheduler) == 0)
        if work is None:
            continue
        here = scheduler.in_order()
        parks.update(ids(scheduler.take_parked()))
        assert max(parks.values(), default=0) <= 2
        running = [image for image in here if image.state is RenderState.RUNNING]
        assert sum(parks[image.id] < 2 for image in running) <= max(max_inflight, len(shares) + 1)
        group = {image.id: scheduler._tickets[image.id].group for image in here}
        seated_or_done = [
            image for image in here if image.state in (RenderState.RUNNING, RenderState.DENOISED)
        ]
        best_ready = min((image.rank for image in seated_or_done), default=3)
        lead = next(iter(work))
        assert isinstance(work, Encode) or lead.rank <= best_ready or lead.rank in shares
        if isinstance(work, Batch):
            encodes = 0
            assert all(
                image.state is RenderState.RUNNING and image.batch_key == work.key for image in work
            )
            assert lead.rank != best_ready or group[lead.id] == min(
                group[image.id] for image in work
            )
            assert len({group[image.id] for image in work}) == 1 or row_buckets or work.is_pinned
            assert len({image.id for image in work}) == len(work)
            assert work.used_rows <= work.bucket_rows
            assert all(image.request.pinned_rows in (None, work.bucket_rows) for image in work)
            assert len({use.name for image in work for use in image.request.adapters}) <= 2
            assert work.is_pinned or len(work) == 1 or work.bucket_rows <= 6
        if isinstance(work, Encode):
            encodes += 1
            assert encodes <= 4 or not any(group[image.id] == group[lead.id] for image in running)
        do(scheduler, work)
        if isinstance(work, Decode):
            finished.add(work.image.id)
        scheduler.charge(work, work.predicted_s * rng.uniform(0.5, 2))

    assert finished | removed == {str(n) for n in range(len(wishes))}


def test_scheduling_needs_no_torch():
    code = (
        "import sys, engine.scheduler, engine.costs, engine.request, engine.config; "
        "sys.exit('torch' in sys.modules)"
    )

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
