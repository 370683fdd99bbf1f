"""Which checkpoints are in a worker's device memory, and which one gives way."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.fleet import FleetInvalid
from policy.residency import (
    ALL,
    GB,
    Awaited,
    ResidencyRule,
    Resident,
    Swap,
    drawn_first,
    next_swap,
    problems_on_a_cpu,
    rule_of,
    that_fit,
    too_large,
)
from tests.builders import a_fleet

TWO = ResidencyRule(device_bytes=200, patience_s=10.0)
NOW = 1000.0
LRU = {"pools.local.residency": "lru"}


def held(name, **changes) -> Resident:
    """A checkpoint that was loaded long ago, and that nobody needs."""
    plain = {"size_bytes": 100, "loaded_at": 0.0, "load_s": 5.0, "used_at": 900.0, "jobs": 0}
    return Resident(name=name, **plain | changes)


def wanted(name, *, for_s=0.0, size_bytes=100) -> Awaited:
    return Awaited(name, size_bytes, NOW - for_s)


def swap(residents, *awaited, rule=TWO) -> Swap | None:
    return next_swap(residents, awaited, rule, now=NOW)


# --- what gives way -------------------------------------------------------------------------------


def test_a_checkpoint_that_fits_is_loaded_beside_the_others():
    assert swap([held("a", jobs=1)], wanted("b")) == Swap("b")


def test_the_least_recently_used_that_nobody_needs_gives_way():
    residents = [held("new", used_at=950), held("old", used_at=910), held("busy", jobs=1)]

    assert swap(residents, wanted("c"), rule=ResidencyRule(300)) == Swap("c", ("old",))


def test_one_that_turned_out_larger_than_the_budget_has_the_device_to_itself():
    larger = wanted("larger", size_bytes=201, for_s=20.0)

    assert swap([held("a"), held("b")], larger, wanted("c")) == Swap("larger", ("a", "b"))


def test_as_many_give_way_as_a_large_one_takes():
    residents = [held("a", used_at=1), held("b", used_at=2)]

    assert swap(residents, wanted("large", size_bytes=200)) == Swap("large", ("a", "b"))


def test_one_that_is_needed_stays_until_somebody_has_waited_long_enough():
    residents = [held("a", jobs=1, used_at=950), held("b", jobs=3, used_at=940)]

    assert swap(residents, wanted("c", for_s=9.9)) is None
    assert swap(residents, wanted("c", for_s=10.0)) == Swap("c", ("b",))


def test_one_that_is_needed_stays_as_long_as_its_load_took_whoever_waits():
    residents = [held("a", jobs=1, loaded_at=NOW - 4.9), held("b", jobs=1, loaded_at=NOW - 4.9)]

    assert swap(residents, wanted("c", for_s=99)) is None
    assert swap([*residents[:1], held("b", jobs=1)], wanted("c", for_s=99)) == Swap("c", ("b",))


def test_one_that_nobody_needs_gives_way_however_lately_it_was_loaded():
    residents = [held("a", jobs=1), held("b", loaded_at=NOW - 0.1)]

    assert swap(residents, wanted("c")) == Swap("c", ("b",))


def test_another_may_go_first_but_not_once_the_first_has_waited_long_enough():
    residents = [held("a", jobs=1, loaded_at=NOW - 1)]
    small = wanted("small", size_bytes=50)

    assert swap(residents, wanted("large", for_s=9, size_bytes=200), small) == Swap("small")
    assert swap(residents, wanted("large", for_s=10, size_bytes=200), small) is None


def test_without_a_budget_nothing_ever_gives_way():
    assert swap([held("a"), held("b")], wanted("c"), rule=ALL) == Swap("c")


@st.composite
def residents(draw) -> list[Resident]:
    instants = st.floats(0, NOW)
    return [
        held(
            f"held {number}",
            size_bytes=draw(st.integers(1, 100)),
            loaded_at=draw(instants),
            load_s=draw(st.floats(0, 60)),
            used_at=draw(instants),
            jobs=draw(st.integers(0, 3)),
        )
        for number in range(draw(st.integers(0, 5)))
    ]


@given(
    here=residents(),
    waits=st.lists(st.tuples(st.integers(1, 150), st.floats(0, 100)), min_size=1, max_size=4),
)
def test_a_swap_fits_the_budget_and_takes_nothing_that_has_to_stay(here, waits):
    rule = ResidencyRule(device_bytes=150, patience_s=10.0)
    awaited = [
        Awaited(f"wanted {number}", size_bytes, NOW - for_s)
        for number, (size_bytes, for_s) in enumerate(waits)
    ]

    found = next_swap(here, awaited, rule, now=NOW)

    if found is None:
        return
    one = next(each for each in awaited if each.name == found.loaded)
    stay = [each for each in here if each.name not in found.evicted]
    gone = [each for each in here if each.name in found.evicted]
    assert sum(each.size_bytes for each in stay) + one.size_bytes <= 150
    for each in gone:
        if each.jobs:
            assert NOW - one.since >= 10
            assert NOW - each.loaded_at >= each.load_s
    assert not found.evicted or sum(each.size_bytes for each in here) + one.size_bytes > 150


@given(here=residents(), size_bytes=st.integers(1, 150))
def test_whoever_has_waited_long_enough_gets_room_once_all_have_been_held_long_enough(
    here, size_bytes
):
    rule = ResidencyRule(device_bytes=150, patience_s=10.0)
    later = NOW + 60

    found = next_swap(here, [Awaited("wanted", size_bytes, NOW)], rule, now=later)

    assert found is not None


# --- what is there at the start -------------------------------------------------------------------

VERSIONS = {
    "models.pocket.versions": [
        {"id": "old", "source": "a", "traffic_weight": 0.0},
        {"id": "small", "source": "b", "traffic_weight": 1.0},
        {"id": "main", "source": "c", "traffic_weight": 9.0},
    ]
}


def test_versions_that_are_drawn_most_come_first_and_those_of_weight_0_not_at_all():
    assert drawn_first(a_fleet(VERSIONS), "local") == ("pocket@main", "pocket@small")


def test_a_version_of_weight_0_that_a_tier_chooses_is_there_from_the_start():
    fleet = a_fleet(VERSIONS | {"models.pocket.tiers.fast": {"version": "old"}})

    assert drawn_first(fleet, "local") == ("pocket@main", "pocket@old", "pocket@small")


def test_a_pool_that_has_versions_of_weight_0_alone_has_them_from_the_start():
    pool = {"models": ["pocket@old"], "slots": 8, "max_batch_rows": 8}

    assert drawn_first(a_fleet(VERSIONS | {"pools.canary": pool}), "canary") == ("pocket@old",)


def test_those_in_front_that_fit_are_loaded_and_a_smaller_one_behind_them():
    sizes = {"a": 120, "b": 100, "c": 80}

    assert that_fit(["a", "b", "c"], sizes, taken_bytes=0, rule=TWO) == ("a", "c")
    assert that_fit(["a", "b", "c"], sizes, taken_bytes=0, rule=ALL) == ("a", "b", "c")


# --- what fleet.toml says -------------------------------------------------------------------------


def test_a_pool_keeps_all_of_its_models_unless_it_says_otherwise():
    assert rule_of(a_fleet().pools["local"], gpu_bytes=0) == ALL


def test_the_budget_is_what_the_pool_says_and_else_a_share_of_the_gpu():
    said = a_fleet(LRU | {"pools.local.device_memory_gb": 2.5}).pools["local"]
    unsaid = a_fleet(LRU | {"pools.local.swap_after_s": 3}).pools["local"]

    assert rule_of(said, gpu_bytes=100 * GB).device_bytes == 2.5 * GB
    assert rule_of(unsaid, gpu_bytes=100 * GB) == ResidencyRule(70 * GB, 3.0)


def test_a_cpu_needs_a_budget_and_keeps_no_copies():
    pool = a_fleet(LRU | {"pools.local.host_memory_gb": 4}).pools["local"]

    told = [problem.partition(": ")[0] for problem in problems_on_a_cpu("local", pool)]
    assert told == ["pools.local.device_memory_gb", "pools.local.host_memory_gb"]
    assert problems_on_a_cpu("local", a_fleet().pools["local"]) == []


@pytest.mark.parametrize("key", ["device_memory_gb", "host_memory_gb", "swap_after_s"])
def test_a_key_of_residency_lru_is_refused_without_it(key):
    with pytest.raises(FleetInvalid, match=f"pools.local.{key}: means something with residency"):
        a_fleet({f"pools.local.{key}": 1.0})


def test_a_model_that_the_budget_never_holds_is_named():
    pool = a_fleet(LRU | {"pools.local.device_memory_gb": 2}).pools["local"]

    [told] = too_large("local", pool, {"a@1": 2 * GB, "b@1": 2 * GB + 10**7})

    assert told == (
        "pools.local.device_memory_gb: 2 is less than the 2.01 GB of the weights of b@1"
    )
