"""How tiers share a worker's slots."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.tiers import guaranteed_slots, may_take, own_slots
from tests.builders import a_fleet

TIERS = ("fast", "quality", "batch")  # by rank; of 16 slots 4, 2 and 1 are guaranteed


def filled_by(tier, slots, held=()) -> Counter:
    """What a worker holds when `tier` takes one image after the other until it may not."""
    held = Counter(held)
    while may_take(a_fleet(), tier, held, slots):
        held[tier] += 1
    return held


def test_the_guarantee_is_the_tier_s_share_of_the_slots():
    assert [guaranteed_slots(a_fleet(), tier, 16) for tier in TIERS] == [4, 2, 1]


def test_the_highest_tier_may_take_every_slot():
    assert filled_by("fast", 16) == {"fast": 16}


def test_a_lower_tier_never_takes_the_last_slots():
    assert filled_by("quality", 16) == {"quality": 12}
    assert filled_by("batch", 16) == {"batch": 10}


def test_a_lower_tier_keeps_its_share_beside_a_busy_higher_one():
    held = {"fast": 14}

    assert filled_by("batch", 16, held) == {"fast": 14, "batch": 1}
    assert filled_by("quality", 16, held) == {"fast": 14, "quality": 2}


def test_a_worker_full_of_the_highest_tier_takes_only_the_guaranteed_share_of_others():
    assert filled_by("fast", 16, {"fast": 16}) == {"fast": 16}
    assert filled_by("quality", 16, {"fast": 16}) == {"fast": 16, "quality": 2}
    assert filled_by("batch", 16, {"fast": 16}) == {"fast": 16, "batch": 1}


def test_a_higher_tier_is_taken_by_a_worker_full_of_lower_ones():
    full = {"batch": 10, "quality": 6}

    assert filled_by("fast", 16, full) == {**full, "fast": 16}
    assert filled_by("quality", 16, {"batch": 10}) == {"batch": 10, "quality": 12}


@pytest.mark.parametrize("tier", TIERS)
def test_the_front_queue_fills_twice_the_slots_less_what_other_tiers_are_promised(
    tier,
):
    held = Counter({tier: 16})

    while may_take(a_fleet(), tier, held, 16, is_front=True):
        held[tier] += 1

    promised = {name: guaranteed_slots(a_fleet(), name, 16) for name in TIERS if name != tier}
    assert held.total() == 32 - sum(promised.values())
    for other in promised:
        assert filled_by(other, 16, held)[other] >= promised[other]


def test_the_front_queue_is_open_whenever_the_tier_s_own_queue_is():
    crowded = {"batch": 40, "quality": 40, "fast": 12}

    assert may_take(a_fleet(), "fast", crowded, 16)
    assert may_take(a_fleet(), "fast", crowded, 16, is_front=True)


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_on_a_small_worker_a_tier_with_a_share_keeps_one_slot_whoever_fills_the_rest(slots):
    assert all(may_take(a_fleet(), tier, {}, slots) for tier in TIERS)
    assert may_take(a_fleet(), "batch", {"fast": 10, "quality": 10}, slots)
    assert not may_take(a_fleet(), "batch", {"fast": 10, "quality": 10, "batch": 1}, slots)


def test_a_tier_without_a_share_is_promised_nothing():
    fleet = a_fleet({"tiers.batch.guaranteed_share": 0.0})

    assert guaranteed_slots(fleet, "batch", 16) == 0
    assert not may_take(fleet, "batch", {"fast": 16}, 16)


@given(
    slots=st.integers(1, 64),
    tier=st.sampled_from(TIERS),
    held=st.dictionaries(st.sampled_from((*TIERS, "gone")), st.integers(0, 500)),
    is_front=st.booleans(),
)
def test_a_tier_within_its_guarantee_gets_in_whatever_others_hold(slots, tier, held, is_front):
    held[tier] = min(held.get(tier, 0), guaranteed_slots(a_fleet(), tier, slots) - 1)

    assert may_take(a_fleet(), tier, held, slots, is_front=is_front)


@given(
    slots=st.integers(1, 64),
    tier=st.sampled_from(TIERS),
    held=st.dictionaries(st.sampled_from(TIERS), st.integers(0, 200)),
)
def test_images_held_of_lower_tiers_keep_nobody_out(slots, tier, held):
    fleet = a_fleet()
    better = {
        name: images
        for name, images in held.items()
        if fleet.tiers[name].rank <= fleet.tiers[tier].rank
    }

    assert may_take(fleet, tier, held, slots) == may_take(fleet, tier, better, slots)


@pytest.mark.parametrize(
    ("tier", "slots"), [("fast", 48), ("quality", 36), ("batch", 29), ("gone", 48)]
)
def test_of_three_workers_a_tier_has_all_slots_but_those_kept_for_better_ones(tier, slots):
    assert own_slots(a_fleet(), tier, 48) == slots
