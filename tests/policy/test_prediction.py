"""What a job will take and when it will be done.

Guesses, and how they are corrected by how wrong the last ones were.
"""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from policy.prediction import (
    DeviceCost,
    EtaRatios,
    QueuedFlow,
    TierQueue,
    corrected,
    learn_ratios,
    predicted_s,
    raw_eta_s,
)
from policy.steps import Denoising

SECONDS = st.floats(0, 1e6)
FLOWS = st.lists(
    st.builds(
        QueuedFlow, weight=st.floats(0.1, 10), jobs=st.integers(1, 100), cost_s=st.floats(0.1, 1e5)
    )
)


def cost_of(cost=None, **changes) -> float:
    params = {
        "width_px": 1000,
        "height_px": 1000,
        "denoising": Denoising(steps=20, rows=1),
        "num_images": 1,
    }
    return predicted_s(cost, **{**params, **changes})


def share_below(ratios: list[float], quantile: float) -> float:
    return sum(ratio <= quantile for ratio in ratios) / len(ratios)


def test_a_job_takes_its_rows_times_its_steps_and_what_is_fixed_of_each_image():
    cost = DeviceCost(row_step_s=0.01, fixed_s=0.3)

    assert cost_of(cost) == pytest.approx(20 * 0.01 + 0.3)
    assert cost_of(cost, denoising=Denoising(20, rows=2)) == pytest.approx(20 * 2 * 0.01 + 0.3)
    assert cost_of(cost, denoising=Denoising(20, rows=2), num_images=4) == pytest.approx(
        4 * (20 * 2 * 0.01 + 0.3)
    )


def test_a_cost_that_was_never_seen_is_guessed_by_its_pixels_and_never_free():
    assert cost_of(width_px=128, height_px=128) > 0
    assert cost_of(width_px=2000) == pytest.approx(2 * cost_of())
    assert cost_of(denoising=Denoising(40, rows=1)) > cost_of()


def test_in_fair_order_a_flow_is_given_its_weight_s_part_of_the_lead_or_all_it_has():
    flows = [QueuedFlow(1, 10, 100.0), QueuedFlow(2, 10, 100.0), QueuedFlow(1, 2, 4.0)]

    seconds, jobs = TierQueue(flows).before(20)

    assert (seconds, jobs) == pytest.approx((20 + 40 + 4, 2 + 4 + 2))


def test_nothing_is_ahead_of_who_starts_level():
    assert TierQueue([QueuedFlow(1, 10, 100.0)]).before(0) == (0, 0)
    assert TierQueue([QueuedFlow(1, 10, 100.0)]).before(-5) == (0, 0)


@given(flows=FLOWS, lead_s=SECONDS, more_s=SECONDS)
def test_the_further_behind_the_more_is_ahead_and_never_more_than_there_is(flows, lead_s, more_s):
    near_s, near = TierQueue(flows).before(lead_s)
    far_s, far = TierQueue(flows).before(lead_s + more_s)

    assert near_s - 1e-6 <= far_s <= sum(flow.cost_s for flow in flows) + 1e-6
    assert near - 1e-6 <= far <= sum(flow.jobs for flow in flows) + 1e-6


@given(flows=FLOWS, lead_s=SECONDS)
def test_a_line_gives_what_its_flows_give_each_for_itself(flows, lead_s):
    given_s, jobs = (
        zip(*(flow.before(lead_s) for flow in flows), strict=True) if flows else ((), ())
    )

    assert TierQueue(flows).before(lead_s) == pytest.approx((sum(given_s), sum(jobs)), abs=1e-6)


def test_a_flow_whose_cost_is_not_known_goes_before_whoever_comes_with_all_it_has():
    assert TierQueue([QueuedFlow(1, 3, 0.0), QueuedFlow(1, 10, 100.0)]).before(0) == (0, 3)


def test_all_that_is_ahead_is_spread_over_the_devices_and_the_job_shares_its_own():
    assert raw_eta_s(ahead_s=60, image_device_s=2, devices=3, concurrent_images=4) == 20 + 8
    assert raw_eta_s(ahead_s=60, image_device_s=2, devices=0, concurrent_images=0.5) == 60 + 2


def test_the_first_guess_is_the_median_and_nine_in_ten_take_up_to_twice_as_long():
    eta = corrected(10, None)

    assert (eta.p50_s, eta.p90_s) == (10, 20)


@given(raw_s=SECONDS, p50=st.floats(1e-3, 1e3), p90=st.floats(1e-3, 1e3))
def test_a_corrected_guess_has_its_p90_never_below_its_p50(raw_s, p50, p90):
    eta = corrected(raw_s, EtaRatios(p50, p90))

    assert eta.p50_s == raw_s * p50
    assert eta.p90_s >= eta.p50_s


@pytest.mark.parametrize("median", [0.2, 1.0, 6.0])
@pytest.mark.parametrize("spread", [0.3, 0.8])
def test_of_ratios_as_they_come_half_lie_below_p50_and_nine_tenths_below_p90(median, spread):
    chance = random.Random(11)
    past, next_ones = (
        [chance.lognormvariate(math.log(median), spread) for _ in range(count)]
        for count in (400, 5000)
    )

    known = None
    for observed, ratio in enumerate(past):
        known = learn_ratios(known, ratio, observed=observed)

    # A step of 0.05 in the logarithm keeps a quantile trembling: for the narrower spread by about
    # 0.11 and 0.05 of the share below.
    assert share_below(next_ones, known.p50) == pytest.approx(0.5, abs=0.2)
    assert share_below(next_ones, known.p90) == pytest.approx(0.9, abs=0.08)


def test_the_first_job_moves_the_ratios_by_half_their_way_and_the_hundredth_by_a_twentieth():
    first, later = EtaRatios(1.0, 2.0), 100

    above = learn_ratios(None, 3.0, observed=0)
    assert (above.p50, above.p90) == pytest.approx((math.exp(0.5), 2 * math.exp(0.9)))
    second = learn_ratios(first, 3.0, observed=1)
    assert (second.p50, second.p90) == pytest.approx((math.exp(0.25), 2 * math.exp(0.45)))
    below = learn_ratios(first, 0.5, observed=later)
    assert (below.p50, below.p90) == pytest.approx((math.exp(-0.025), 2 * math.exp(-0.005)))


def test_learnt_ratios_follow_when_jobs_begin_to_take_twice_as_long():
    chance, known = random.Random(5), None
    for observed in range(800):
        median = 1.0 if observed < 400 else 2.0
        known = learn_ratios(known, chance.lognormvariate(math.log(median), 0.4), observed=observed)

    assert known.p50 == pytest.approx(2.0, rel=0.3)


@given(ratios=st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=60))
def test_whatever_is_told_what_was_learnt_stays_a_positive_number_within_bounds(ratios):
    known = None
    for observed, ratio in enumerate(ratios):
        known = learn_ratios(known, ratio, observed=observed)

        assert 1e-3 <= known.p50 <= 1e3
        assert 1e-3 <= known.p90 <= 1e3


@pytest.mark.parametrize("nonsense", [0.0, -1.0, math.nan, math.inf])
def test_nothing_is_learnt_from_a_ratio_that_is_none(nonsense):
    known = EtaRatios(1.25, 2.5)

    assert learn_ratios(known, nonsense, observed=7) == known
