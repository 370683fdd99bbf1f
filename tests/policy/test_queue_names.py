"""The queues that fleet.toml implies."""

from policy import queues
from tests.builders import a_fleet


def test_every_pool_and_tier_has_a_render_queue_and_every_tier_a_results_queue():
    assert queues.all_queues(a_fleet()) == [
        "local.fast",
        "local.quality",
        "local.batch",
        "big.fast",
        "big.quality",
        "big.batch",
        "results.fast",
        "results.quality",
        "results.batch",
        "maintenance",
    ]


def test_a_worker_consumes_its_pool_s_queues_in_rank_order():
    fleet = a_fleet({"tiers.fast.rank": 9})

    assert queues.render_queues(fleet, "big") == ["big.quality", "big.batch", "big.fast"]
    assert queues.results_queues(fleet) == ["results.quality", "results.batch", "results.fast"]
