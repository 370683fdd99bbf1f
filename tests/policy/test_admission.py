"""Who is let in, and how long they will wait.

By what goes before them, and by nothing that comes after.
"""

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.admission import (
    JITTER,
    LONGEST_RETRY_S,
    SHORTEST_RETRY_S,
    PoolSnapshot,
    QueuePosition,
    RunningJobs,
    TenantBacklog,
    first_guess_s,
    queue_position,
    refusal,
)
from policy.prediction import EtaRatios, QueuedFlow, TierQueue
from tests.builders import a_fleet

NOTHING_AHEAD = QueuePosition(ahead_s=0.0, jobs_ahead=0, concurrent_images=1.0)
DRAWS = st.floats(0, 1, exclude_max=True)


@dataclass(frozen=True)
class Flow:
    """What a tenant has waiting, and where; is_own: it is the one who asks."""

    tier: str
    waiting: QueuedFlow
    is_own: bool


def waiting(cost_s, *, jobs=10, tier="fast", weight=1.0, is_own=False) -> Flow:
    return Flow(tier, QueuedFlow(weight, jobs, cost_s), is_own)


def a_snapshot(flows, *, devices=1, running=None, handoff_fill=0.0, held=None) -> PoolSnapshot:
    queues = {
        tier: TierQueue(flow.waiting for flow in flows if flow.tier == tier)
        for tier in {flow.tier for flow in flows}
    }
    own = {flow.tier: TenantBacklog(flow.waiting, flow.waiting) for flow in flows if flow.is_own}
    return PoolSnapshot(devices, queues, running or {}, handoff_fill, own, held)


def place(*flows, tier="fast", lead_s=0.0, num_images=1, devices=1, running=None):
    """Where a job of the pool of 16 slots stands."""
    snapshot = a_snapshot(flows, devices=devices, running=running)
    return queue_position(
        a_fleet(), snapshot, pool="local", tier=tier, num_images=num_images, lead_s=lead_s
    )


def guess_s(*flows, job_device_s=1.0, devices=1, num_images=1, **where) -> float:
    there = place(*flows, devices=devices, num_images=num_images, **where)
    return first_guess_s(
        there, a_snapshot(flows, devices=devices), job_device_s=job_device_s, num_images=num_images
    )


def refused(
    *flows,
    there=NOTHING_AHEAD,
    ratios=None,
    tier="fast",
    job_device_s=1.0,
    draw=0.5,
    devices=1,
    handoff_fill=0.0,
    fleet=None,
    held=None,
):
    snapshot = a_snapshot(flows, devices=devices, handoff_fill=handoff_fill, held=held)
    return refusal(
        fleet or a_fleet(),
        snapshot,
        there,
        ratios,
        pool="local",
        tier=tier,
        checkpoint="pocket@v1",
        job_device_s=job_device_s,
        draw=draw,
    )


def ahead(seconds) -> QueuePosition:
    return QueuePosition(ahead_s=seconds, jobs_ahead=1, concurrent_images=1.0)


def within_jitter(retry_after_s, seconds) -> bool:
    """A whole number of seconds, rounded up, that is at most a fifth away."""
    return seconds * (1 - JITTER) <= retry_after_s < seconds * (1 + JITTER) + 1


def test_items_of_a_batch_go_before_its_next_one_and_count_against_the_tenant():
    own = {"fast": TenantBacklog(QueuedFlow(1.0, 2, 20.0), QueuedFlow(1.0, 5, 50.0))}
    snapshot = PoolSnapshot(
        1, {"fast": TierQueue([QueuedFlow(1.0, 2, 20.0), QueuedFlow(1.0, 4, 40.0)])}, own=own
    )
    fleet = a_fleet({"tiers.fast.max_queued_s_per_tenant": 50.5})

    there = queue_position(fleet, snapshot, pool="local", tier="fast", num_images=1, lead_s=50)

    assert (there.ahead_s, there.jobs_ahead) == (50 + 40, 5 + 4)
    assert (
        queue_position(fleet, snapshot, pool="local", tier="batch", num_images=1, lead_s=0).ahead_s
        == 50 + 40
    )
    assert (
        refusal(
            fleet,
            snapshot,
            there,
            None,
            pool="local",
            tier="fast",
            checkpoint="pocket@v1",
            job_device_s=1.0,
            draw=0.5,
        ).reason
        == "tenant_queue_full"
    )


def test_the_longer_one_s_own_backlog_the_longer_one_waits():
    guesses = [
        guess_s(waiting(backlog_s, is_own=True), lead_s=backlog_s) for backlog_s in (10, 20, 40)
    ]
    jobs = [
        place(waiting(10.0 * count, jobs=count, is_own=True), lead_s=10.0 * count).jobs_ahead
        for count in (1, 2, 4)
    ]

    assert guesses == [11, 21, 41]
    assert jobs == [1, 2, 4]


@given(dump_s=st.floats(100, 1e6), jobs=st.integers(10, 10_000))
def test_another_tenant_s_dump_behind_one_s_own_place_changes_nothing(dump_s, jobs):
    mine, small = waiting(20, jobs=2, is_own=True), waiting(40, jobs=4)
    large = waiting(40 + dump_s, jobs=round(4 * (40 + dump_s) / 40))

    for lead_s in (0, 10, 40):
        with_small, with_large = (
            place(mine, small, lead_s=lead_s),
            place(mine, large, lead_s=lead_s),
        )

        assert with_large.ahead_s == with_small.ahead_s
        assert abs(with_large.jobs_ahead - with_small.jobs_ahead) <= 1, "rounded"


def test_a_tenant_with_nothing_waiting_has_nothing_of_a_dump_ahead():
    dump = waiting(1e5, jobs=10_000)

    assert place(dump).jobs_ahead == 0
    assert guess_s(dump, job_device_s=2.0) == 2


def test_all_that_better_tiers_have_goes_before_and_nothing_of_lower_ones():
    flows = (waiting(10, tier="fast"), waiting(20, tier="quality"), waiting(40, tier="batch"))
    in_hand = {"fast": RunningJobs(1, 2), "quality": RunningJobs(3, 4), "batch": RunningJobs(5, 6)}

    assert [
        place(*flows, tier=tier, running=in_hand).ahead_s for tier in ("fast", "quality", "batch")
    ] == [
        1,
        10 + 1 + 3,
        10 + 20 + 1 + 3 + 5,
    ]


def test_more_devices_shorten_the_wait():
    assert guess_s(waiting(60, is_own=True), lead_s=60, devices=3) == 21


def test_company_on_the_device_is_what_is_in_hand_up_to_its_slots():
    def company(images, devices=1, num_images=1):
        return place(
            running={"batch": RunningJobs(0.0, images)}, devices=devices, num_images=num_images
        ).concurrent_images

    assert (company(0), company(5), company(100)) == (1, 6, 16)
    assert (company(11, devices=4), company(0, num_images=4, devices=4)) == (3, 4)


def test_a_job_that_would_be_done_in_time_is_let_in():
    assert refused() is None
    assert refused(waiting(1e9), there=ahead(29)) is None


def test_job_of_a_model_that_no_live_worker_serves_is_refused_by_its_name():
    no = refused(held=["other@v1"])

    assert no.reason == "unserved"
    assert no.detail == "No live worker serves version v1 of model pocket."
    assert refused(held=["other@v1", "pocket@v1"]) is None
    assert (
        refused(held=["other@v1"], devices=0, fleet=a_fleet({"pools.local.scalable": True})) is None
    )


def test_a_pool_that_nothing_serves_is_said_to_be_unserved():
    no = refused(devices=0)

    assert no.reason == "unserved"
    assert "local" in no.detail
    assert within_jitter(no.retry_after_s, 60)


@pytest.mark.parametrize(
    "change",
    [{"pools.local.warm_floor": 1}, {"pools.local.scalable": True}],
    ids=["warm", "scalable"],
)
def test_a_pool_whose_workers_are_still_to_come_is_served(change):
    assert refused(devices=0, there=ahead(1e6), fleet=a_fleet(change)) is None


def test_a_tenant_with_enough_waiting_is_refused_while_another_is_let_in():
    fleet = a_fleet({"tiers.fast.max_queued_s_per_tenant": 100.0})
    mine, other_s = waiting(99.5, is_own=True), waiting(99.5)

    no = refused(mine, fleet=fleet)

    assert no.reason == "tenant_queue_full"
    assert refused(other_s, fleet=fleet) is None
    assert refused(waiting(98.5, is_own=True), fleet=fleet) is None
    assert refused(waiting(99.5, is_own=True, tier="batch"), fleet=fleet) is None


@pytest.mark.parametrize(
    ("weight", "devices", "wait_s"), [(1.0, 1, 80), (3.0, 1, 40), (1.0, 2, 40)]
)
def test_a_tenant_with_enough_waiting_is_told_when_its_share_will_have_done_the_excess(
    weight, devices, wait_s
):
    fleet = a_fleet({"tiers.fast.max_queued_s_per_tenant": 100.0})
    mine = waiting(110, weight=weight, is_own=True)

    no = refused(mine, waiting(1000, weight=3.0), job_device_s=10, fleet=fleet, devices=devices)

    assert within_jitter(no.retry_after_s, wait_s)


@pytest.mark.parametrize(
    "flows", [(), (waiting(0.0, jobs=0, is_own=True),)], ids=["its first ever", "the only one"]
)
def test_a_job_of_which_nothing_else_waits_is_let_in_however_large_it_is(flows):
    fleet = a_fleet({"tiers.fast.max_queued_s_per_tenant": 100.0})

    assert refused(*flows, job_device_s=1e6, fleet=fleet) is None


def test_a_job_larger_than_what_may_wait_is_told_when_the_others_will_be_done():
    fleet = a_fleet({"tiers.fast.max_queued_s_per_tenant": 100.0})

    no = refused(waiting(60.0, is_own=True), job_device_s=1e6, fleet=fleet)

    assert within_jitter(no.retry_after_s, 60)


def test_while_the_hand_off_is_overfull_nothing_is_let_in():
    assert refused(handoff_fill=0.9) is None

    no = refused(handoff_fill=0.91)

    assert no.reason == "handoff_full"
    assert within_jitter(no.retry_after_s, 5)


@pytest.mark.parametrize(("tier", "deadline_s"), [("fast", 30), ("quality", 600)])
def test_a_job_that_would_not_start_before_its_deadline_is_refused(tier, deadline_s):
    assert refused(tier=tier, there=ahead(deadline_s)) is None

    no = refused(tier=tier, there=ahead(deadline_s + 50))

    assert no.reason == "saturated"
    assert f"{deadline_s} s" in no.detail
    assert within_jitter(no.retry_after_s, 50)


def test_the_wait_is_over_all_devices():
    assert refused(there=ahead(50), devices=2) is None
    assert refused(there=ahead(70), devices=2).reason == "saturated"


@pytest.mark.parametrize(("p90", "wait_s"), [(0.5, 20), (2.0, 40), (4.0, 80), (100.0, 80)])
def test_whoever_was_wrong_before_is_careful_now_but_no_more_than_fourfold(p90, wait_s):
    no = refused(there=ahead(20), ratios=EtaRatios(p50=0.5, p90=p90))

    assert (no is None) == (wait_s <= 30)
    assert no is None or f"{wait_s} s" in no.detail


@given(wait_s=st.floats(31, 1e6), draw=DRAWS)
def test_refusals_ask_back_within_ten_minutes_in_whole_seconds(wait_s, draw):
    no = refused(there=ahead(wait_s), draw=draw)

    assert isinstance(no.retry_after_s, int)
    assert SHORTEST_RETRY_S <= no.retry_after_s <= LONGEST_RETRY_S


@pytest.mark.parametrize("wait_s", [130, 100_000])
def test_refusals_given_together_do_not_ask_back_together(wait_s):
    asked_back = {
        refused(there=ahead(wait_s), draw=number / 100).retry_after_s for number in range(100)
    }

    assert len(asked_back) > 30
    assert max(asked_back) > 1.3 * min(asked_back)
