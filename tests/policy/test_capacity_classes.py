"""What a capacity class of a pool changes: the terms of a worker, and who may be of it."""

import pytest

from policy.cost import class_shares
from policy.workers import (
    WorkersInvalid,
    WorkerTerms,
    class_key,
    class_problem,
    is_of_gpu_class,
    terms_of,
    workers_by_class,
)
from tests.builders import a_fleet

SPOT = {"market": "spot", "gpu_class": "l40s", "gpu_hour_price": 0.4, "slots": 20}


def a_pool(**classes):
    fleet = a_fleet({"pools.local.classes": classes}) if classes else a_fleet()
    return fleet.pools["local"]


def test_class_says_what_differs_and_the_pool_says_the_rest():
    pool = a_pool(spot=SPOT, mine={"market": "reserved"})

    spot, mine = pool.of_class("spot"), pool.of_class("mine")

    assert (spot.market, spot.gpu_class, spot.gpu_hour_price, spot.slots) == tuple(SPOT.values())
    assert (mine.market, mine.gpu_class, mine.gpu_hour_price, mine.slots) == (
        "reserved",
        "any",
        1.2,
        16,
    )
    assert pool.of_class("") is pool


def test_terms_of_a_worker_are_those_of_its_class():
    pool = a_pool(spot=SPOT)

    assert terms_of(pool, "spot") == WorkerTerms("spot", "spot", "l40s", 0.4)
    assert terms_of(pool, "") == terms_of(pool, "spot"), "the only class"
    assert terms_of(a_pool(), "") == WorkerTerms("", None, "any", 1.2)


def test_worker_of_a_pool_with_several_classes_must_say_its_own():
    pool = a_pool(spot=SPOT, mine={})

    assert class_problem(pool, "") == ("a worker must say of which of its capacity classes it is")
    assert class_problem(pool, "sport") == "'sport' is not one of its capacity classes"
    assert class_problem(pool, "mine") == ""
    assert class_problem(a_pool(), "spot") == "'spot' is not one of its capacity classes"
    assert class_problem(a_pool(), "") == ""


@pytest.mark.parametrize(
    ("gpu_class", "device", "is_one"),
    [
        ("any", "cpu", True),
        ("cpu", "cpu", True),
        ("l40s", "NVIDIA L40S", True),
        ("h100-80gb", "NVIDIA H100 80GB HBM3", True),
        ("h100", "NVIDIA H200", False),
        ("l40", "NVIDIA L40S", False),
        ("h100", "cpu", False),
    ],
)
def test_device_is_of_a_gpu_class_whose_words_are_in_its_name(gpu_class, device, is_one):
    assert is_of_gpu_class(gpu_class, device) is is_one


@pytest.mark.parametrize(
    ("wish", "found"),
    [
        ("local.spot=2", {"local.spot": 2, "big": 1}),
        (
            "0,local.spot=1,local.mine=2",
            {"local.spot": 1, "local.mine": 2, "big": 0},
        ),
        ("0", {"local": 0, "big": 0}),
    ],
)
def test_number_of_workers_may_be_of_a_class(wish, found):
    fleet = a_fleet({"pools.local.classes": {"spot": SPOT, "mine": {}}})

    assert workers_by_class(wish, fleet.pools) == found


@pytest.mark.parametrize("wish", ["1", "local=2", "local.sport=1"])
def test_number_of_workers_of_no_class_is_refused_where_there_are_several(wish):
    fleet = a_fleet({"pools.local.classes": {"spot": SPOT, "mine": {}}})

    with pytest.raises(WorkersInvalid, match=r"accepted: local\.spot=NUMBER, local\.mine=NUMBER"):
        workers_by_class(wish, fleet.pools)


def test_workers_that_name_no_class_are_of_the_one_that_is_said_for_all():
    pools = {"local": a_pool(spot=SPOT, mine={})}

    assert workers_by_class("2", pools, said="mine") == {"local.mine": 2}


def test_class_renders_as_large_a_share_as_its_live_slots_are():
    pool = a_pool(spot=SPOT, mine={})

    assert class_shares(pool, {"spot": 24, "mine": 8}) == {"spot": 0.75, "mine": 0.25}
    assert class_shares(pool, {}) == {"spot": 0.5, "mine": 0.5}
    assert class_shares(a_pool(), {}) == {"": 1.0}


def test_class_has_a_name_beside_its_pool_s():
    assert (class_key("sdxl", "spot"), class_key("sdxl", "")) == ("sdxl.spot", "sdxl")
