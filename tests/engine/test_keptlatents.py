"""Kept latents belong to one owner, and never take more than their bytes."""

import pytest
import torch
from engine_builders import a_request

from engine.errors import UnsupportedRequest
from engine.keptlatents import KeptLatents, StepLatents
from engine.request import Fork

KILOBYTE = 1024


def latents_of(id: str, *, step: int = 1, owner: str = "acme", kilobytes: int = 1) -> StepLatents:
    return StepLatents(a_request(id, owner=owner), "weights", step, torch.zeros(1, kilobytes * 256))


def kept_names(store: KeptLatents, *names: str, step: int = 1, owner: str = "acme") -> list[str]:
    found = []
    for name in names:
        try:
            store.find(owner, Fork(name, step))
        except UnsupportedRequest:
            continue
        found.append(name)
    return found


def test_latents_kept_twice_after_one_step_are_the_newer_ones_and_count_once():
    store = KeptLatents(10 * KILOBYTE)
    store.keep(latents_of("a", kilobytes=3))
    again = latents_of("a", kilobytes=2)

    store.keep(again)

    assert (len(store), store.size_bytes) == (1, 2 * KILOBYTE)
    assert store.find("acme", Fork("a", 1)) is again


def test_latents_of_another_step_or_owner_are_kept_beside():
    store = KeptLatents(10 * KILOBYTE)

    store.keep(latents_of("a"))
    store.keep(latents_of("a", step=2))
    store.keep(latents_of("a", owner="globex"))

    assert (len(store), store.size_bytes) == (3, 3 * KILOBYTE)


def test_latents_are_found_by_their_owner_alone():
    store = KeptLatents(10 * KILOBYTE)
    store.keep(latents_of("a"))

    with pytest.raises(
        UnsupportedRequest, match="no latents of image 'a' are kept after step 1"
    ) as refused:
        store.find("globex", Fork("a", 1))

    assert refused.value.field == "fork"
    assert store.find("acme", Fork("a", 1)).step == 1


def test_latents_used_least_recently_go_first():
    store = KeptLatents(2 * KILOBYTE)
    store.keep(latents_of("a"))
    store.keep(latents_of("b"))
    store.find("acme", Fork("a", 1))

    store.keep(latents_of("c"))

    assert store.size_bytes == 2 * KILOBYTE
    assert kept_names(store, "a", "b", "c") == ["a", "c"]


def test_latents_larger_than_all_the_room_are_not_kept_and_push_nobody_out():
    store = KeptLatents(2 * KILOBYTE)
    store.keep(latents_of("a"))

    store.keep(latents_of("large", kilobytes=3))

    assert (len(store), store.size_bytes) == (1, KILOBYTE)
    assert kept_names(store, "a", "large") == ["a"]


def test_latents_larger_than_all_the_room_leave_those_of_an_earlier_try():
    store = KeptLatents(2 * KILOBYTE)
    store.keep(latents_of("a"))

    store.keep(latents_of("a", kilobytes=3))

    assert store.size_bytes == KILOBYTE


def test_latents_found_and_missed_are_counted():
    store = KeptLatents(2 * KILOBYTE)
    store.keep(latents_of("a"))

    kept_names(store, "a", "a", "b")

    assert (store.hits, store.misses) == (2, 1)
