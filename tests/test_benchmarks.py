"""The arithmetic that benchmarks judge by.

Who arrives when, percentiles, ours beside the best of the others, memory a request.
"""

import itertools

import pytest

from benchmarks.chaos.faults import plan_faults
from benchmarks.engine.cells import Cell, Comparison
from benchmarks.engine.targets import TARGETS
from benchmarks.engine.traffic import MIX, arrivals, by_kind, one_of_each
from benchmarks.gateway.http_load import Load
from benchmarks.lib.integrity.workload import workload
from benchmarks.lib.statistics import growth, growth_per_request, jain, percentile
from benchmarks.lib.verdict import judge
from benchmarks.reload.findings import Findings
from engine.request import ImageRequest

TEMPLATE = ImageRequest(
    id="bench",
    group="bench",
    checkpoint="tiny",
    prompt="",
    width_px=64,
    height_px=64,
    num_steps=1,
    guidance=1.0,
    sampler="ddim",
    seed=0,
)


def of_kind(num_steps: int, trace) -> list[ImageRequest]:
    return [arrival.request for arrival in trace if arrival.request.num_steps == num_steps]


def a_cell(*latencies_s: float, num_steps: int = 4, seconds: float = 10.0) -> Cell:
    return Cell({num_steps: list(latencies_s)}, seconds)


def test_every_system_is_given_the_same_trace():
    assert arrivals(50, TEMPLATE, seed=3) == arrivals(50, TEMPLATE, seed=3)
    assert arrivals(50, TEMPLATE, seed=3) != arrivals(50, TEMPLATE, seed=4)


def test_requests_arrive_in_order_and_as_many_as_gaps():
    trace = arrivals(200, TEMPLATE, seed=0)

    instants = [arrival.at for arrival in trace]
    assert instants == sorted(instants)
    assert instants[0] >= 0
    assert instants[-1] <= 200
    assert len({arrival.request.id for arrival in trace}) == 200


def test_gaps_between_arrivals_are_those_of_a_poisson_process():
    instants = [arrival.at for seed in range(20) for arrival in arrivals(500, TEMPLATE, seed=seed)]
    gaps = [after - before for before, after in itertools.pairwise(instants) if after > before]

    shares = [sum(gap > length for gap in gaps) / len(gaps) for length in (0.5, 1, 2, 3)]

    assert shares == pytest.approx([0.607, 0.368, 0.135, 0.050], abs=0.02)  # e to the minus length


def test_each_kind_has_its_exact_share_of_every_trace():
    trace = arrivals(100, TEMPLATE, seed=1)

    assert [len(of_kind(kind.num_steps, trace)) for kind in MIX] == [40, 30, 30]
    assert not any(request.is_guided for request in of_kind(4, trace) + of_kind(8, trace))
    assert all(request.is_guided for request in of_kind(30, trace))


def test_kinds_come_in_no_order():
    steps = [arrival.request.num_steps for arrival in arrivals(100, TEMPLATE, seed=1)]

    changes = sum(before != after for before, after in itertools.pairwise(steps))

    assert changes > 40


def test_there_is_one_request_of_each_kind():
    assert [request.num_steps for request in one_of_each(TEMPLATE)] == [4, 8, 30]


def test_one_call_renders_what_is_equal_in_steps_and_guidance_and_the_shortest_go_first():
    requests = [arrival.request for arrival in arrivals(20, TEMPLATE, seed=2)]

    groups = by_kind(requests)

    assert [{request.num_steps for request in group} for group in groups] == [{4}, {8}, {30}]
    assert sorted(request.id for group in groups for request in group) == sorted(
        request.id for request in requests
    )


@pytest.mark.parametrize(
    ("count", "share", "expected"),
    [
        (1, 0.99, 1),
        (2, 0.5, 1),
        (100, 0.5, 50),
        (100, 0.99, 99),
        (101, 0.99, 100),
        (200, 0.99, 198),
    ],
)
def test_a_percentile_is_a_measured_value_that_so_many_do_not_exceed(count, share, expected):
    assert percentile(range(count, 0, -1), share) == expected


def test_rounds_are_pooled():
    cell = a_cell(1.0, 2.0, seconds=4.0)

    cell.add(Cell({4: [3.0], 8: [9.0]}, 6.0))

    assert cell.requests == 4
    assert cell.images_per_s == pytest.approx(0.4)
    assert cell.percentile_s(0.99) == 9.0
    assert cell.percentile_s(0.99, 4) == 3.0
    assert cell.percentile_s(0.50, 8) == 9.0


def test_ours_is_held_against_the_best_of_the_others():
    comparison = Comparison(
        {
            (0.8, "slow"): a_cell(8.0),
            (0.8, "good"): a_cell(6.0),
            (0.8, "ours"): a_cell(2.0),
            (1.5, "slow"): a_cell(1.0, 1.0),
            (1.5, "good"): a_cell(*[1.0] * 8),
            (1.5, "ours"): a_cell(*[1.0] * 10),
        }
    )

    assert comparison.p99_ratio(0.8, 4) == pytest.approx(3.0)
    assert comparison.throughput_ratio(1.5) == pytest.approx(1.25)


def test_memory_that_grows_by_so_much_a_request_is_found_beneath_noise():
    noise = [300, -200, 100, -100, 0, 200, -300]

    readings = [1_000_000 + 50 * wave * 2048 + jitter for wave, jitter in enumerate(noise)]

    assert growth_per_request(readings, requests_between=50) == pytest.approx(2048, rel=0.01)


def test_growth_is_from_the_first_third_to_the_last_and_no_peak_decides_it():
    assert growth([100, 100, 180, 110, 110, 110, 120, 120, 120]) == pytest.approx(0.2)
    assert growth([100, 100, 100, 100, 180, 100, 100, 100, 180]) == 0


def test_a_target_is_met_or_missed_where_there_is_a_figure_that_shows_it():
    assert judge(
        {"device_share": 0.97, "leak_kib_per_request": 2.0, "leak_canceled": 7}, TARGETS
    ) == {
        "device_share": True,
        "leak_kib_per_request": False,
    }
    names = [target.figure for target in TARGETS]
    assert judge(dict.fromkeys(names, 1.0), TARGETS, not_judged=names) == {}


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_plan_of_faults_has_every_kind_in_time_and_leaves_each_process_the_time_to_come_back(
    seed,
):
    workers = ["worker-1", "worker-2", "worker-3"]

    faults = plan_faults(
        seed, window_s=250, every_s=5, workers=workers, lease_s=15, notices=True, few=False
    )

    assert {fault.kind for fault in faults} == {
        "kill",
        "terminate",
        "restart",
        "freeze",
        "cut",
        "flush",
        "notice",
    }
    assert {fault.target for fault in faults} >= {
        "results",
        "sweeper",
        "gateway",
        "broker",
        "handoff",
        "postgres",
        "s3",
    }
    assert faults == plan_faults(
        seed, window_s=250, every_s=5, workers=workers, lease_s=15, notices=True, few=False
    )
    for before, after in itertools.combinations(faults, 2):
        if before.target == after.target:
            assert after.at_s >= before.at_s + before.for_s, f"{after} comes while {before} lasts"
    assert all(
        fault.for_s > 15 for fault in faults if fault.kind == "freeze" and fault.target in workers
    )


def test_the_jobs_of_a_chaos_run_are_the_same_for_every_seed_of_faults():
    first, again = (workload(100, every_s=0.5, seed=0) for _ in range(2))

    assert first == again
    assert {planned.parameters["tier"] for planned in first} == {"fast", "quality", "batch"}


def test_fairness_between_tenants_is_one_for_equals_and_small_for_one_who_has_all():
    assert jain([2.0] * 20) == pytest.approx(1)
    assert jain([1.0, *[0.0] * 19]) == pytest.approx(1 / 20)


@pytest.mark.parametrize(
    ("started_at", "ended_at", "is_counted"),
    [
        (10.5, 11.5, True),
        (9.5, 11.9, True),  # slower than the time that counts is long
        (9.0, 9.9, False),
        (11.5, 12.1, False),
    ],
)
def test_gateway_load_counts_the_answers_that_come_in_its_time(started_at, ended_at, is_counted):
    load = Load(address=("127.0.0.1", 80), counted_from=10.0, until=12.0)

    load.count(202, started_at, ended_at)
    load.count(503, started_at, ended_at)

    assert (len(load.taken_ms), load.other[503]) == (is_counted, is_counted)


# --- reload ---------------------------------------------------------------------------------------


def test_reload_is_compared_with_the_quiet_steps_around_it():
    slowing_down = Findings(
        quiet_s=[[1.0] * 9, [3.0] * 9, [5.0] * 9], reloading_s=[[2.0] * 9, [4.0] * 9]
    )

    assert slowing_down.ratio(0.99) == 1.0
    assert slowing_down.spread(0.99) == 5.0


def test_reload_beside_other_work_does_not_decide_the_figure():
    quiet_s = [[1.0] * 9] * 4
    findings = Findings(quiet_s=quiet_s, reloading_s=[[1.0] * 9, [9.0] * 9, [1.02] * 9])

    assert findings.ratio(0.99) == 1.02
