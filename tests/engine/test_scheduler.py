"""Who advances next: driven by hand, one turn at a time."""

import subprocess
import sys

import pytest
from engine_builders import a_pinned_image, an_image, ids

from engine.inflight import ImageState
from engine.scheduler import Scheduler


def a_scheduler(max_inflight=8, max_batch_rows=16) -> Scheduler:
    return Scheduler(max_inflight=max_inflight, max_batch_rows=max_batch_rows)


def turn(scheduler) -> list[str]:
    """One denoise step; the ids that took it."""
    batch = scheduler.next_batch()
    scheduler.settle(batch)
    return ids(batch)


def test_a_newcomer_joins_at_the_next_step_boundary():
    scheduler = a_scheduler()
    scheduler.add(an_image("early", num_steps=20))
    scheduler.settle(scheduler.next_batch())

    scheduler.add(an_image("late", num_steps=4))

    assert ids(scheduler.next_batch()) == ["early", "late"]


def test_an_empty_scheduler_has_no_batch():
    assert a_scheduler().next_batch() is None


def test_steps_guidance_samplers_and_seeds_share_a_forward():
    scheduler = a_scheduler()
    scheduler.add(an_image("a", num_steps=20, guidance=7.5, sampler="euler", seed=1))
    scheduler.add(an_image("b", num_steps=4, guidance=1.0, sampler="ddim", seed=2))

    batch = scheduler.next_batch()

    assert ids(batch) == ["a", "b"]
    assert batch.bucket_rows == batch.used_rows == 3  # two rows for the guided one, one for the other


def test_sizes_do_not_share_a_forward_and_take_turns():
    scheduler = a_scheduler()
    for id, size in (("a", 64), ("b", 128), ("c", 192)):
        scheduler.add(an_image(id, size=size, num_steps=9))

    turns = [turn(scheduler) for _ in range(6)]

    assert turns == [["a"], ["b"], ["c"], ["a"], ["b"], ["c"]]


def test_an_odd_size_is_not_starved_by_a_stream_of_newcomers():
    scheduler = a_scheduler(max_inflight=4)
    scheduler.add(an_image("odd", size=192, num_steps=3))
    seen = []
    for n in range(8):
        scheduler.add(an_image(f"usual {n}", num_steps=2))
        seen += turn(scheduler)

    assert seen.count("odd") == 3


def test_a_better_rank_goes_first():
    scheduler = a_scheduler(max_batch_rows=2)
    scheduler.add(an_image("bulk", rank=2, num_steps=9))
    turn(scheduler)

    scheduler.add(an_image("interactive", rank=0, num_steps=2))

    assert [turn(scheduler) for _ in range(3)] == [["interactive"], ["interactive"], ["bulk"]]


def test_a_better_rank_parks_a_seated_image_which_comes_back_with_its_steps():
    scheduler = a_scheduler(max_inflight=1)
    bulk = an_image("bulk", rank=2, num_steps=9)
    scheduler.add(bulk)
    turn(scheduler)

    scheduler.add(an_image("interactive", rank=0, num_steps=1))

    assert turn(scheduler) == ["interactive"]
    assert bulk.step == 1
    assert turn(scheduler) == ["bulk"]
    assert bulk.step == 2


def test_a_better_rank_of_another_size_goes_before_everything_else():
    scheduler = a_scheduler()
    scheduler.add(an_image("bulk", rank=1, num_steps=9))
    turn(scheduler)

    scheduler.add(an_image("interactive", rank=0, size=128, num_steps=2))

    assert [turn(scheduler) for _ in range(3)] == [["interactive"], ["interactive"], ["bulk"]]


def test_within_a_rank_the_first_to_arrive_goes_first():
    scheduler = a_scheduler(max_batch_rows=4)
    for id in "abc":
        scheduler.add(an_image(id, num_steps=2))

    assert [turn(scheduler) for _ in range(3)] == [["a", "b"], ["a", "b"], ["c"]]


def test_no_more_images_than_seats_advance():
    scheduler = a_scheduler(max_inflight=2)
    for id in "abc":
        scheduler.add(an_image(id))

    assert ids(scheduler.next_batch()) == ["a", "b"]


def test_no_forward_has_more_rows_than_allowed_but_small_images_fill_the_gap():
    scheduler = a_scheduler(max_batch_rows=5)
    for id, guidance in (("a", 4.0), ("b", 4.0), ("c", 4.0), ("d", 1.0)):
        scheduler.add(an_image(id, guidance=guidance))

    batch = scheduler.next_batch()

    assert ids(batch) == ["a", "b", "d"]
    assert batch.used_rows == 5


def test_a_pinned_image_alone_still_gets_its_whole_bucket():
    for guidance, rows in ((4.0, 2), (1.0, 1)):
        scheduler = a_scheduler()
        scheduler.add(a_pinned_image("pinned", bucket_rows=8, guidance=guidance))

        batch = scheduler.next_batch()

        assert (batch.used_rows, batch.bucket_rows) == (rows, 8)


def test_a_best_effort_image_alone_is_not_padded():
    scheduler = a_scheduler()
    scheduler.add(an_image("free"))

    assert scheduler.next_batch().bucket_rows == 2


def test_four_guided_images_share_a_bucket_of_eight_and_the_fifth_waits():
    scheduler = a_scheduler()
    for id in "abcde":
        scheduler.add(a_pinned_image(id, bucket_rows=8, num_steps=1))

    assert [turn(scheduler) for _ in range(2)] == [["a", "b", "c", "d"], ["e"]]


def test_spare_rows_of_a_bucket_are_lent_to_best_effort_images():
    scheduler = a_scheduler()
    scheduler.add(an_image("free"))
    scheduler.add(a_pinned_image("pinned", bucket_rows=8))

    for _ in range(3):
        batch = scheduler.next_batch()
        scheduler.settle(batch)

        assert sorted(ids(batch)) == ["free", "pinned"]
        assert batch.bucket_rows == 8


def test_different_buckets_never_meet_and_take_turns():
    scheduler = a_scheduler()
    scheduler.add(a_pinned_image("eight", bucket_rows=8, num_steps=9))
    scheduler.add(a_pinned_image("four", bucket_rows=4, num_steps=9))

    batches = []
    for _ in range(4):
        batches.append(scheduler.next_batch())
        scheduler.settle(batches[-1])

    assert [(ids(batch), batch.bucket_rows) for batch in batches] == [(["eight"], 8), (["four"], 4)] * 2


def test_best_effort_images_beyond_the_bucket_get_turns_of_their_own():
    scheduler = a_scheduler()
    scheduler.add(a_pinned_image("pinned", bucket_rows=4, num_steps=9))
    for id in "abc":
        scheduler.add(an_image(id, num_steps=9))

    assert [set(turn(scheduler)) for _ in range(4)] == [{"a", "b", "c"}, {"pinned", "a"}] * 2


def test_an_image_of_more_rows_than_the_devices_cap_still_runs_alone():
    scheduler = a_scheduler()
    for id in "ab":
        scheduler.add(an_image(id))
    scheduler.cap_rows(scheduler.get("a").batch_key, 1)

    assert ids(scheduler.next_batch()) == ["a"]


def test_settling_the_last_step_hands_the_image_to_decode():
    scheduler = a_scheduler()
    scheduler.add(an_image("short", num_steps=1))
    scheduler.add(an_image("long", num_steps=2))

    denoised = scheduler.settle(scheduler.next_batch())

    assert ids(denoised) == ids(scheduler.next_decodes()) == ["short"]
    assert ids(scheduler.next_batch()) == ["long"]


def test_a_decode_holds_up_a_better_rank_by_one_image_at_most():
    scheduler = a_scheduler()
    for id in "ab":
        scheduler.add(an_image(id, rank=1, num_steps=1))
    turn(scheduler)
    assert ids(scheduler.next_decodes()) == ["a", "b"]

    scheduler.add(an_image("interactive", rank=0))

    assert ids(scheduler.next_decodes()) == ["a"]


def test_an_image_waiting_for_decode_holds_no_seat():
    scheduler = a_scheduler(max_inflight=1)
    scheduler.add(an_image("done", num_steps=1))
    scheduler.add(an_image("next"))
    turn(scheduler)

    assert ids(scheduler.next_batch()) == ["next"]


def test_prompts_are_encoded_in_order_and_a_few_at_a_time():
    scheduler = a_scheduler()
    for id, rank in (("a", 1), ("b", 1), ("c", 0)):
        scheduler.add(an_image(id, rank=rank, encoded=False))

    assert ids(scheduler.next_encodes(2)) == ["c", "a"]
    assert scheduler.next_batch() is None


def test_an_encoded_newcomer_does_not_wait_for_the_others_to_be_encoded():
    scheduler = a_scheduler()
    scheduler.add(an_image("a", encoded=False))
    scheduler.add(an_image("b", encoded=False))

    scheduler.get("b").state = ImageState.RUNNING

    assert ids(scheduler.next_batch()) == ["b"]


def test_a_removed_image_is_in_no_later_batch_and_settling_ignores_it():
    scheduler = a_scheduler()
    for id in "ab":
        scheduler.add(an_image(id))
    batch = scheduler.next_batch()

    scheduler.remove("a")
    scheduler.remove("a")
    scheduler.settle(batch)

    assert [image.step for image in batch] == [0, 1]
    assert ids(scheduler.next_batch()) == ["b"]
    assert len(scheduler) == 1


def test_two_images_cannot_have_one_id():
    scheduler = a_scheduler()
    scheduler.add(an_image("a"))

    with pytest.raises(ValueError, match="already here"):
        scheduler.add(an_image("a"))


def test_scheduling_needs_no_torch():
    code = "import sys, engine.scheduler, engine.request, engine.config; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
