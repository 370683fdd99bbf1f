"""What work takes: from single measurements to a curve that decisions can rest on."""

import itertools
import json
import random
import subprocess
import sys

import pytest
from engine_builders import a_key, flat, measured_costs, saturated
from hypothesis import given
from hypothesis import strategies as st

from engine.costs import MAX_KEYS, OUTLIER, ROW_S_PER_MEGAPIXEL, STALE_AFTER, CostModel
from engine.curves import from_data, to_data

KEY = a_key()


def costs_of(points: dict[int, float], times: int = 3) -> CostModel:
    costs = CostModel()
    for rows, seconds in points.items():
        for _ in range(times):
            costs.observe_step(KEY, rows, seconds)
    return costs


# --- single measurements --------------------------------------------------------------------------


def test_a_measured_row_count_costs_what_was_measured():
    costs = costs_of({1: 1.0, 4: 2.5})

    assert (costs.step_s(KEY, 1), costs.step_s(KEY, 4)) == (1.0, 2.5)


def test_the_first_forward_of_a_size_pays_for_more_than_itself_so_a_cheaper_second_replaces_it():
    costs = CostModel()
    costs.observe_step(KEY, 1, 30.0)

    costs.observe_step(KEY, 1, 0.1)

    assert costs.step_s(KEY, 1) == 0.1


def test_early_observations_count_alike_and_later_ones_by_the_moving_average():
    costs = CostModel(memory=0.25)
    for seconds in (1.0, 1.2, 1.4):
        costs.observe_step(KEY, 1, seconds)
    assert costs.step_s(KEY, 1) == pytest.approx(1.2)

    costs.observe_step(KEY, 1, 1.2)
    costs.observe_step(KEY, 1, 2.0)

    assert costs.step_s(KEY, 1) == pytest.approx(1.2 + 0.25 * 0.8)


def test_one_outlier_moves_the_average_by_no_more_than_a_double_step_would():
    costs = costs_of({1: 1.0}, times=20)

    costs.observe_step(KEY, 1, 500.0)

    assert costs.step_s(KEY, 1) == pytest.approx(1.0 + costs.memory * (OUTLIER - 1))


def test_a_device_that_became_slower_for_good_is_believed_in_time():
    costs = costs_of({1: 1.0}, times=20)

    for _ in range(60):
        costs.observe_step(KEY, 1, 5.0)

    assert costs.step_s(KEY, 1) == pytest.approx(5.0, rel=0.05)


def test_prompts_from_the_cache_and_encoded_ones_are_averaged():
    costs = CostModel()

    for _ in range(200):
        costs.observe_encode(KEY, 0.0)
        costs.observe_encode(KEY, 1.0)

    assert costs.encode_s(KEY) == pytest.approx(0.5, abs=0.05)


# --- the curve ------------------------------------------------------------------------------------


def test_between_measured_row_counts_the_curve_is_straight():
    costs = costs_of({1: 1.0, 5: 3.0})

    assert [costs.step_s(KEY, rows) for rows in (2, 3, 4)] == [1.5, 2.0, 2.5]


def test_beyond_the_last_measured_row_count_it_goes_on_with_the_last_slope():
    costs = costs_of({1: 1.0, 2: 1.1, 4: 2.1})

    assert costs.step_s(KEY, 8) == pytest.approx(4.1)


def test_below_the_first_it_follows_the_first_slope_but_not_under_the_proportional_share():
    gentle, steep = costs_of({2: 1.0, 4: 1.2}), costs_of({2: 1.0, 4: 4.0})

    assert gentle.step_s(KEY, 1) == pytest.approx(0.9)
    assert steep.step_s(KEY, 1) == 0.5


def test_from_one_row_count_alone_each_further_row_is_guessed_at_half_the_first():
    costs = costs_of({2: 3.0})

    assert [costs.step_s(KEY, rows) for rows in (1, 2, 4)] == [2.0, 3.0, 5.0]


def test_row_counts_that_noise_put_in_the_wrong_order_share_their_mean():
    costs = costs_of({1: 1.0, 2: 2.2, 3: 2.0, 4: 3.0})

    assert [costs.step_s(KEY, rows) for rows in (1, 4)] == [1.0, 3.0]
    assert costs.step_s(KEY, 2) == costs.step_s(KEY, 3) == pytest.approx(2.1, rel=0.01)


def test_recent_steps_outweigh_an_old_measurement_of_more_rows():
    costs = costs_of({1: 1.0, 4: 1.1})

    for _ in range(300):
        costs.observe_step(KEY, 1, 2.0)

    assert costs.step_s(KEY, 1) == costs.step_s(KEY, 4) == pytest.approx(2.0, rel=0.02)


@given(st.dictionaries(st.integers(1, 32), st.floats(1e-4, 1e3), min_size=1))
def test_more_rows_are_never_cheaper_whatever_was_measured(points):
    costs = costs_of(points, times=1)

    curve = [costs.step_s(KEY, rows) for rows in range(1, 65)]

    assert all(more >= fewer * (1 - 1e-9) for fewer, more in itertools.pairwise(curve))
    assert min(curve) > 0


# --- a key never measured -------------------------------------------------------------------------


def test_a_key_never_measured_borrows_the_most_alike_one_scaled_by_pixels():
    costs = measured_costs(saturated, sizes=(64, 512))

    borrowed = a_key(256)

    assert not costs.is_measured(borrowed)
    # 512 is nearer than 64, and has four times the pixels
    assert costs.step_s(borrowed, 2) == 2 / 4
    assert costs.decode_s(borrowed) == 0.5 / 4
    assert costs.encode_s(borrowed) == 0.1  # a prompt has no pixels


def test_the_same_network_call_is_more_alike_than_the_same_size():
    costs = CostModel()
    costs.observe_step(a_key(64, call="control"), 1, 1.0)
    costs.observe_step(a_key(128, call="denoise"), 1, 8.0)

    assert costs.step_s(a_key(64, call="denoise"), 1) == 2.0


def test_a_key_seen_at_one_row_count_alone_borrows_the_shape_of_the_most_alike_key():
    costs = measured_costs(saturated)
    longer_text = a_key(text_length=77)

    for _ in range(3):
        costs.observe_step(longer_text, 4, 6.0)

    assert [costs.step_s(longer_text, rows) for rows in (1, 4, 8)] == [1.5, 6.0, 12.0]
    assert costs.curve(longer_text).knee(16) == 1


def test_another_checkpoint_tells_nothing():
    costs = measured_costs(saturated)
    stranger = a_key(1000, checkpoint="other")

    assert costs.step_s(stranger, 1) == ROW_S_PER_MEGAPIXEL
    assert costs.step_s(stranger, 3) == 2 * ROW_S_PER_MEGAPIXEL
    assert costs.encode_s(stranger) == ROW_S_PER_MEGAPIXEL
    assert costs.decode_s(stranger) == 3 * ROW_S_PER_MEGAPIXEL


def test_a_measurement_replaces_a_borrowed_curve():
    costs = measured_costs(saturated)
    assert costs.step_s(a_key(128), 1) == 4.0

    costs.observe_step(a_key(128), 1, 3.0)

    assert costs.is_measured(a_key(128))
    assert costs.step_s(a_key(128), 1) == 3.0


def test_keys_that_come_once_and_never_again_are_forgotten_and_push_no_curve_out():
    costs = measured_costs(saturated)

    for n in range(3 * MAX_KEYS):
        once = a_key(call=f"alone {n}")
        costs.observe_step(once, 2, 5.0)
        costs.observe_encode(once, 0.1)
        costs.observe_decode(once, 0.5)

    assert len(to_data(costs)["keys"]) <= MAX_KEYS + 1
    assert costs.step_s(KEY, 4) == 4.0
    assert costs.step_s(a_key(call="alone 0"), 2) == 2.0


def test_a_key_in_use_is_not_forgotten_however_long_it_has_been_known():
    costs = CostModel()
    sizes = [a_key(call=f"size {n}") for n in range(MAX_KEYS)]
    for key in sizes:
        for rows in (1, 2):
            costs.observe_step(key, rows, float(rows))

    costs.observe_step(sizes[0], 1, 1.0)
    for rows in (1, 2):
        costs.observe_step(a_key(call="another"), rows, float(rows))

    assert costs.is_measured(sizes[0])
    assert not costs.is_measured(sizes[1])
    assert len(costs.measured_keys()) == MAX_KEYS


# --- growth ---------------------------------------------------------------------------------------


def curve_with_knee_at(knee: int):
    """A row more costs half a single-row step up to the knee, a whole one beyond."""
    return lambda rows: 1 + 0.5 * (min(rows, knee) - 1) + max(0, rows - knee)


@pytest.mark.parametrize("knee", [1, 2, 4, 8, 16])
def test_the_knee_is_where_a_row_more_costs_as_much_as_alone(knee):
    costs = measured_costs(curve_with_knee_at(knee), rows=(1, 2, 4, 8, 16, 32))

    assert costs.curve(KEY).knee(32) == knee


@pytest.mark.parametrize("knee", [2, 4, 8])
@pytest.mark.parametrize("seed", range(5))
def test_the_knee_is_found_under_ten_percent_of_noise(knee, seed):
    rng, costs = random.Random(seed), CostModel()
    for _ in range(20):
        for rows in (1, 2, 4, 8, 16):
            costs.observe_step(KEY, rows, curve_with_knee_at(knee)(rows) * rng.uniform(0.9, 1.1))

    assert costs.curve(KEY).knee(16) == knee


def test_a_flat_curve_has_no_knee_and_a_saturated_one_has_it_at_one_row():
    assert measured_costs(flat).curve(KEY).knee(64) == 64
    assert measured_costs(saturated).curve(KEY).knee(64) == 1


STEEP_BEYOND_FOUR = {1: 1.0, 2: 1.2, 4: 1.6, 8: 4.8, 16: 11.2}


def test_the_knee_is_no_larger_than_what_does_all_rows_soonest_in_parts():
    """Eight rows take less than eight single steps, and more than two forwards of four."""
    assert costs_of(STEEP_BEYOND_FOUR).curve(KEY).knee(16) == 4


def test_rows_are_divided_where_several_forwards_do_them_sooner_by_a_good_deal():
    steep, even = costs_of(STEEP_BEYOND_FOUR).curve(KEY), costs_of({4: 2.0, 8: 4.1}).curve(KEY)

    assert steep.best_part(8, (1, 2, 4)) == 4
    assert steep.best_part(5, (1, 4)) == 5, "4 + 1 take 2.6, 5 take 2.4"
    assert steep.best_part(8, (3,), padded={3: 4, 2: 2, 8: 8}.get) == 3, "4 + 4 + 2"
    assert even.best_part(8, (4,)) == 8, "it gains 2 %"


def test_size_found_dear_only_once_is_not_divided_before_a_second_look():
    costs = costs_of({1: 1.0, 4: 1.6})
    costs.observe_step(KEY, 8, 9.0)
    assert costs.curve(KEY).best_part(8, (4,)) == 8

    costs.observe_step(KEY, 8, 9.0)

    assert costs.curve(KEY).best_part(8, (4,)) == 4


def test_growth_is_judged_by_what_each_row_gained_costs_against_a_single_row_step():
    curve = costs_of({1: 1.0, 2: 1.8, 4: 3.6}).curve(KEY)

    assert curve.is_worth_growing(1, 2, used_rows=1)  # 0.8 for one row
    assert not curve.is_worth_growing(2, 4, used_rows=2)  # 1.8 for two
    assert curve.is_worth_growing(2, 4, used_rows=2, ceiling=0.95)


def test_growth_into_padding_is_paid_by_the_rows_that_use_it():
    curve = costs_of({4: 2.0, 8: 3.0, 1: 1.0}).curve(KEY)

    # a second for one row, though the forward gains four
    assert not curve.is_worth_growing(4, 8, used_rows=1)
    assert curve.is_worth_growing(4, 8, used_rows=2)


def test_a_size_found_too_dear_only_once_is_tried_a_second_time():
    costs = costs_of({1: 1.0})
    costs.observe_step(KEY, 2, 9.0)
    assert costs.curve(KEY).is_worth_growing(1, 2, used_rows=1)

    costs.observe_step(KEY, 2, 9.0)

    assert not costs.curve(KEY).is_worth_growing(1, 2, used_rows=1)


def test_a_size_found_too_dear_is_tried_again_after_many_forwards_but_nothing_larger_with_it():
    costs = measured_costs(saturated)
    curve = costs.curve(KEY)

    for _ in range(STALE_AFTER - 20):
        costs.observe_step(KEY, 1, 1.0)
        assert not curve.is_worth_growing(1, 2, used_rows=1)
    for _ in range(40):
        costs.observe_step(KEY, 1, 1.0)

    assert curve.is_worth_growing(1, 2, used_rows=1)
    assert not curve.is_worth_growing(1, 4, used_rows=3)
    assert not curve.is_worth_growing(2, 4, used_rows=2)  # the size before it is doubtful itself
    costs.observe_step(KEY, 2, 2.0)
    assert not curve.is_worth_growing(1, 2, used_rows=1)


# --- bytes ----------------------------------------------------------------------------------------


def test_rows_are_admitted_beside_what_is_fixed_and_one_decode():
    costs = CostModel()
    costs.observe_memory(KEY, fixed_bytes=1000, per_row_bytes=100, decode_bytes=350)

    assert costs.row_limit(KEY, 2000) == 6
    assert costs.row_limit(KEY, 1000) == 0


def test_without_a_measurement_or_a_budget_memory_sets_no_limit():
    costs = CostModel()
    assert costs.row_limit(KEY, 2000) is None

    costs.observe_memory(KEY, fixed_bytes=1000, per_row_bytes=100, decode_bytes=350)

    assert costs.row_limit(KEY, None) is None
    assert costs.row_limit(a_key(128), 2000) is None


# --- as data --------------------------------------------------------------------------------------


def known_costs() -> CostModel:
    costs = measured_costs(curve_with_knee_at(4), sizes=(64, 128))
    costs.observe_memory(KEY, fixed_bytes=1000, per_row_bytes=100, decode_bytes=350)
    costs.observe_step(a_key(64, call="denoise"), 2, 0.25)
    return costs


def test_costs_written_as_json_and_loaded_elsewhere_say_the_same():
    costs, elsewhere = known_costs(), CostModel()

    elsewhere.adopt(from_data(json.loads(json.dumps(to_data(costs)))))

    assert to_data(elsewhere) == to_data(costs)
    assert elsewhere.is_measured(KEY)
    assert [elsewhere.step_s(KEY, rows) for rows in range(1, 33)] == [
        costs.step_s(KEY, rows) for rows in range(1, 33)
    ]
    assert (elsewhere.encode_s(KEY), elsewhere.decode_s(KEY)) == (0.1, 0.5)
    assert elsewhere.row_limit(KEY, 2000) == 6


def test_a_loaded_curve_is_believed_and_moved_slowly_by_what_is_observed_on_top():
    elsewhere = CostModel()
    elsewhere.adopt(known_costs().measurements())

    elsewhere.observe_step(KEY, 1, 30.0)  # the first forward of this process

    assert elsewhere.step_s(KEY, 1) == pytest.approx(1.1)
    assert elsewhere.curve(KEY).knee(16) == 4


def test_loading_keeps_what_was_measured_here():
    here = CostModel()
    for _ in range(3):
        here.observe_step(KEY, 1, 7.0)

    here.adopt(known_costs().measurements())

    assert here.step_s(KEY, 1) == 7.0
    assert here.step_s(a_key(128), 1) == 1.0


def broken(change) -> object:
    data = json.loads(json.dumps(to_data(known_costs())))
    return change(data) or data


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda data: [data], "curves: .* is not an object"),
        (lambda data: data.pop("keys") and None, "curves: keys is missing"),
        (lambda data: data.update(version=2), "version: 2 is not 1"),
        (lambda data: data.update(keys={}), r"keys: \{\} is not a list"),
        (lambda data: data["keys"][1].pop("key") and None, r"keys\[1\]: key is missing"),
        (lambda data: data["keys"][1].update(colour=1), r"keys\[1\]: 'colour' is not known"),
        (
            lambda data: data["keys"][0]["key"].update(width_px=0),
            r"keys\[0\]\.key\.width_px: 0 is not a whole number from 1 up",
        ),
        (
            lambda data: data["keys"][0]["key"].update(checkpoint=3),
            r"keys\[0\]\.key\.checkpoint: 3 is not a string",
        ),
        (
            lambda data: data["keys"][0].update(steps=[[1]]),
            r"keys\[0\]\.steps\[0\]: \[1\] is not a list of 2",
        ),
        (
            lambda data: data["keys"][0].update(steps=[[True, 1.0]]),
            r"keys\[0\]\.steps\[0\]\[0\]: True is not a whole number from 1 up",
        ),
        (
            lambda data: data["keys"][0].update(steps=[[1, 0.0]]),
            r"keys\[0\]\.steps\[0\]\[1\]: 0.0 is not a number of seconds",
        ),
        (
            lambda data: data["keys"][0].update(decode_s="1"),
            r"keys\[0\]\.decode_s: '1' is not a number of seconds",
        ),
        (
            lambda data: data["keys"][0].update(encode_s=float("nan")),
            r"keys\[0\]\.encode_s: nan is not a number of seconds",
        ),
        (
            lambda data: data["keys"][0].update(memory={"fixed_bytes": 1}),
            r"keys\[0\]\.memory: per_row_bytes is missing",
        ),
    ],
)
def test_a_malformed_file_is_refused_by_the_place_that_is_wrong_and_nothing_is_taken_over(
    change, complaint
):
    costs = CostModel()

    with pytest.raises(ValueError, match=complaint):
        costs.adopt(from_data(broken(change)))

    assert costs.measurements() == []


@pytest.mark.parametrize("memory", [0, -0.1, 1.1])
def test_the_weight_of_the_newest_observation_is_above_0_and_at_most_1(memory):
    with pytest.raises(ValueError, match="memory"):
        CostModel(memory=memory)


def test_costs_need_no_torch():
    code = "import sys, engine.costs; sys.exit('torch' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
