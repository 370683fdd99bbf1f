"""The queues that fleet.toml implies."""

from policy import queues
from tests.builders import a_fleet


def test_every_pool_and_tier_has_a_render_queue_and_every_tier_a_results_queue():
    assert queues.all_queues(a_fleet()) == [
        "local.fast.front",
        "local.fast",
        "local.quality.front",
        "local.quality",
        "local.batch.front",
        "local.batch",
        "big.fast.front",
        "big.fast",
        "big.quality.front",
        "big.quality",
        "big.batch.front",
        "big.batch",
        "results.fast",
        "results.quality",
        "results.batch",
        "webhooks",
    ]


def test_a_worker_consumes_its_pool_s_queues_in_rank_order():
    fleet = a_fleet({"tiers.fast.rank": 9})

    assert queues.render_queues(fleet, "big") == [
        *("big.quality.front", "big.quality"),
        *("big.batch.front", "big.batch"),
        *("big.fast.front", "big.fast"),
    ]
    assert queues.results_queues(fleet) == ["results.quality", "results.batch", "results.fast"]


def test_a_queue_s_name_tells_its_tier_and_whether_it_is_a_front_queue():
    assert queues.tier_of(queues.render_queue("big", "fast")) == ("fast", False)
    assert queues.tier_of(queues.render_queue("big", "fast", is_front=True)) == ("fast", True)


def test_images_of_a_tier_that_the_catalogue_no_longer_has_wait_with_those_of_the_last_in_rank():
    assert queues.results_queue(a_fleet(), "gone") == "results.batch"
    assert queues.results_queue(a_fleet(), "fast") == "results.fast"
