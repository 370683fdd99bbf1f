"""Nobody waits behind somebody else's work for long.

The real scheduler and cost model on a simulated device.

The device is a curve of seconds by rows for every size; time is a number. Arrivals are Poisson with
fixed seeds, so every run is the same. The curves named after a GPU are published ones (notes:
Qwen-Image on one H200), the rest are made for the rule they test.
"""

import random
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pytest
from engine_builders import a_key, an_image, saturated

from engine.costs import CostModel
from engine.inflight import BatchKey, InFlight, RenderState
from engine.scheduler import Batch, Decode, Encode, Scheduler, Work

Seconds = Callable[[int], float]  # of a forward by its rows


def slow(*values):
    """A case that `make test` leaves out."""
    return pytest.param(*values, marks=pytest.mark.slow)


def throughput_curve(single_row_s: float, images_per_s: dict[int, float]) -> Seconds:
    """From relative images per second at some row counts; straight in between."""
    rows = sorted(images_per_s)
    seconds = [single_row_s * n / images_per_s[n] for n in rows]

    def curve(n: int) -> float:
        left = min(max(bisect_right(rows, n) - 1, 0), len(rows) - 2)
        slope = (seconds[left + 1] - seconds[left]) / (rows[left + 1] - rows[left])
        return seconds[left] + slope * (n - rows[left])

    return curve


GPU_512 = throughput_curve(0.167, {1: 1, 2: 1.82, 4: 2.77, 8: 3.14, 16: 3.21})  # batching gives 3 x
# batching gives nothing
GPU_1024 = throughput_curve(0.243, {1: 1, 2: 1.02, 4: 1.0, 8: 1.0, 16: 1.0})
MIX = ((0.4, 4, 1), (0.3, 8, 1), (0.3, 30, 2))  # share, steps, rows


@dataclass
class Device:
    """What work takes: `forward_s` by size and rows; encode and decode as so many single-row steps
    of the size.
    """

    forward_s: dict[int, Seconds]
    encode_steps: float = 0.3
    decode_steps: float = 1.0
    noise: float = 0.0
    rng: random.Random = field(default_factory=lambda: random.Random(0))

    def encode_s(self, size: int) -> float:
        return self.encode_steps * self.forward_s[size](1)

    def decode_s(self, size: int) -> float:
        return self.decode_steps * self.forward_s[size](1)

    def alone_s(self, image: InFlight) -> float:
        """The whole image with nobody else on the device."""
        size = image.batch_key.width_px
        return (
            self.encode_s(size)
            + image.num_steps * self.forward_s[size](image.rows)
            + self.decode_s(size)
        )

    def takes(self, work: Work) -> float:
        size = work.key.width_px
        if isinstance(work, Batch):
            seconds = self.forward_s[size](work.bucket_rows)
        else:
            seconds = self.encode_s(size) if isinstance(work, Encode) else self.decode_s(size)
        return seconds * (1 + self.noise * self.rng.uniform(-1, 1))

    def costs(self) -> CostModel:
        """As a warm-up would leave them."""
        costs = CostModel()
        for size, forward_s in self.forward_s.items():
            for rows in (1, 2, 4, 8, 16):
                for _ in range(3):
                    costs.observe_step(a_key(size), rows, forward_s(rows))
            costs.observe_encode(a_key(size), self.encode_s(size))
            costs.observe_decode(a_key(size), self.decode_s(size))
        return costs


@dataclass
class Run:
    """What happened."""

    arrived_at: dict[str, float]
    done_at: dict[str, float] = field(default_factory=dict)  # in the order of finishing
    # when it ended, what it was, its seconds
    works: list[tuple[float, Work, float]] = field(default_factory=list)
    parks: Counter[str] = field(default_factory=Counter)

    def latencies(self, num_steps: int | None = None) -> list[float]:
        """Of all, or of those asked for with so many steps, ascending."""
        mine = (id for id in self.done_at if num_steps is None or id.endswith(f" {num_steps}"))
        return sorted(self.done_at[id] - self.arrived_at[id] for id in mine)

    def percentile(self, share: float, num_steps: int | None = None) -> float:
        latencies = self.latencies(num_steps)
        return latencies[int(share * (len(latencies) - 1))]

    def images_per_s(self) -> float:
        return len(self.done_at) / (max(self.done_at.values()) - min(self.arrived_at.values()))


Arrivals = list[tuple[float, InFlight]]


def poisson(count: int, load: float, device: Device, seed: int = 0, sizes=None) -> Arrivals:
    """`count` images of the mix; at load 1 one image after the other would just keep up."""
    rng = random.Random(seed)
    sizes = sizes or list(device.forward_s)
    images = []
    for n in range(count):
        _, num_steps, rows = rng.choices(MIX, weights=[share for share, _, _ in MIX])[0]
        size = rng.choice(sizes)
        image = an_image(
            f"{n}: {num_steps}",
            size=size,
            num_steps=num_steps,
            guidance=4.0 if rows == 2 else 1.0,
            encoded=False,
        )
        images.append(image)
    mean_s = sum(map(device.alone_s, images)) / count
    now_s, arrivals = 0.0, []
    for image in images:
        now_s += rng.expovariate(load / mean_s)
        arrivals.append((now_s, image))
    return arrivals


def simulate(
    scheduler: Scheduler,
    arrivals: Arrivals,
    device: Device,
    *,
    until_s: float = float("inf"),
    lag: int = 0,
) -> Run:
    """Serve until everybody is done or `until_s`.

    With `lag`, seconds are known only so many pieces of work later, as on a GPU.
    """
    run = Run({image.id: at for at, image in arrivals})
    coming = list(reversed(arrivals))
    launched: list[tuple[Work, float]] = []
    now_s = 0.0
    while now_s < until_s:
        while coming and coming[-1][0] <= now_s:
            scheduler.add(coming.pop()[1], now_s)
        work = scheduler.next_work(now_s)
        run.parks.update(image.id for image in scheduler.take_parked())
        if work is None:
            if not coming:
                break
            now_s = coming[-1][0]
            continue
        seconds = device.takes(work)
        now_s += seconds
        if isinstance(work, Encode):
            work.image.state = RenderState.RUNNING
        elif isinstance(work, Batch):
            for image in work:
                image.count_step()
        scheduler.settle(work)
        if isinstance(work, Decode):
            run.done_at[work.image.id] = now_s
            scheduler.remove(work.image.id)
        run.works.append((now_s, work, seconds))
        launched.append((work, seconds))
        if len(launched) > lag:
            scheduler.charge(*launched.pop(0))
    return run


def first_come_first_served(arrivals: Arrivals, device: Device) -> Run:
    """One image after the other, each from encode to decode."""
    run = Run({image.id: at for at, image in arrivals})
    now_s = 0.0
    for at, image in arrivals:
        now_s = max(now_s, at) + device.alone_s(image)
        run.done_at[image.id] = now_s
    return run


def a_scheduler(costs: CostModel, **changes) -> Scheduler:
    return Scheduler(costs, **{"max_inflight": 16, "max_batch_rows": 16} | changes)


def longest_gaps(run: Run) -> dict[BatchKey, float]:
    """Of each batch key, the longest time between the ends of two of its forwards."""
    last, gaps = {}, defaultdict(float)
    for ended_at, work, _ in run.works:
        if isinstance(work, Batch):
            gaps[work.key] = max(gaps[work.key], ended_at - last.get(work.key, 0.0))
            last[work.key] = ended_at
    return gaps


# --- lanes ----------------------------------------------------------------------------------------


def endless(size: int, count: int = 4, num_steps: int = 10**6) -> Arrivals:
    return [(0.0, an_image(f"{size} {n}", size=size, num_steps=num_steps)) for n in range(count)]


def test_two_saturated_lanes_get_the_same_seconds_though_one_costs_nine_times_the_other():
    device = Device({64: saturated, 192: lambda rows: 9.0 * rows})

    run = simulate(a_scheduler(device.costs()), endless(64) + endless(192), device, until_s=10_000)

    seconds = Counter()
    for _, work, took_s in run.works:
        seconds[work.key.width_px] += took_s
    assert seconds[64] == pytest.approx(seconds[192], rel=0.02)


def test_seconds_stay_equal_when_short_images_come_and_go_and_measurements_are_poor():
    device = Device(
        {64: GPU_512, 192: lambda rows: 4 * GPU_1024(rows)},
        encode_steps=0.5,
        decode_steps=3.0,
        noise=0.3,
    )
    images = [
        (0.0, an_image(f"{size} {n}", size=size, num_steps=num_steps, encoded=False))
        for n in range(200)
        for size, num_steps in ((64, 4), (192, 8))
    ]

    run = simulate(a_scheduler(CostModel()), images, device, until_s=200, lag=3)

    served = Counter(id.split()[0] for id in run.done_at)
    assert 0 < served["192"] < served["64"] < 200  # both had work to the end
    seconds = Counter()
    for _, work, took_s in run.works:
        seconds[work.key.width_px] += took_s
    assert seconds[64] == pytest.approx(seconds[192], rel=0.1)


@pytest.mark.parametrize("odd", [64, 128, 192])
def test_no_lane_waits_longer_than_a_round_whatever_the_others_cost(odd):
    forward_s = {
        64: lambda rows: 0.1 * rows,
        128: lambda rows: 1.0 * rows,
        192: lambda rows: 5.0 * rows,
    }
    device = Device(forward_s, decode_steps=0.0)
    images = [
        arrival for size in forward_s for arrival in endless(size, count=1 if size == odd else 6)
    ]

    run = simulate(a_scheduler(device.costs(), max_inflight=32), images, device, until_s=500)

    costliest_s = max(curve(2) for curve in forward_s.values())
    # each lane its quantum, overdrawn by a forward at most
    round_s = len(forward_s) * 2 * costliest_s
    assert max(longest_gaps(run).values()) <= round_s


def test_a_newcomer_of_a_cheap_size_is_served_at_once_beside_an_expensive_one():
    device = Device({64: lambda rows: 0.1 * rows, 192: lambda rows: 5.0 * rows})
    arrivals = [
        *endless(192),
        *((7.0 + 50 * n, an_image(f"{n}: 4", size=64, num_steps=4)) for n in range(30)),
    ]

    run = simulate(a_scheduler(device.costs()), arrivals, device, until_s=1600)

    forward_s = 10.0
    assert len(run.latencies(4)) == 30
    # the rest of the forward that runs, then its own 0.9 s
    assert run.latencies(4)[-1] <= forward_s + 1.0


@pytest.mark.parametrize("seed", [0, slow(1), slow(2)])
def test_under_mixed_sizes_nobody_takes_many_times_as_long_as_alone(seed):
    device = Device(
        {64: GPU_512, 128: lambda rows: 2 * GPU_1024(rows), 192: lambda rows: 3 * GPU_512(rows)}
    )
    arrivals = poisson(400, 0.7, device, seed)
    alone_s = {image.id: device.alone_s(image) for _, image in arrivals}

    run = simulate(a_scheduler(device.costs()), arrivals, device)
    one_by_one = first_come_first_served(arrivals, device)

    slowdowns = sorted((run.done_at[id] - run.arrived_at[id]) / alone_s[id] for id in alone_s)
    theirs = sorted(
        (one_by_one.done_at[id] - one_by_one.arrived_at[id]) / alone_s[id] for id in alone_s
    )
    assert len(slowdowns) == 400
    assert slowdowns[-1] < 8
    assert slowdowns[-1] < theirs[-1] / 8


# --- ageing ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ageing", [0.05, 0.2, 0.5])
def test_ageing_bounds_which_later_images_pass_a_long_one_in_an_endless_stream(
    ageing,
):
    device = Device({64: saturated}, encode_steps=0.0, decode_steps=0.5)
    short_every_s = 4.0  # each takes 4.5 s: the queue only grows
    long = an_image("long", num_steps=15, encoded=False)
    shorts = [
        (short_every_s * n, an_image(f"{n}: 4", num_steps=4, guidance=1.0, encoded=False))
        for n in range(400)
    ]
    arrivals = sorted([*shorts, (100.0, long)], key=lambda arrival: arrival[0])

    run = simulate(a_scheduler(device.costs(), max_inflight=4, ageing=ageing), arrivals, device)

    last_to_pass_s = 100.0 + (device.alone_s(long) - 4.5) / ageing
    passed_by = list(run.done_at)[: list(run.done_at).index("long")]
    # a few arrive while it is served
    assert max(run.arrived_at[id] for id in passed_by) <= last_to_pass_s + device.alone_s(long)
    before = sum(4.5 for at, _ in shorts if at <= last_to_pass_s)
    assert run.done_at["long"] <= before + device.alone_s(long) + 4 * 4.5


def test_without_ageing_it_would_wait_for_the_end_of_the_stream():
    device = Device({64: saturated}, encode_steps=0.0, decode_steps=0.5)
    shorts = [
        (4.0 * n, an_image(f"{n}: 4", num_steps=4, guidance=1.0, encoded=False)) for n in range(200)
    ]

    run = simulate(
        a_scheduler(device.costs(), ageing=0.0),
        [(0.0, an_image("long", num_steps=15, encoded=False)), *shorts],
        device,
    )

    assert list(run.done_at)[-1] == "long"


# --- latency and throughput -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size_curve", "factor"), [(GPU_512, 8), (GPU_1024, 8)], ids=["512", "1024"]
)
def test_at_load_0_8_the_p99_of_4_step_images_beats_first_come_first_served_many_times(
    size_curve, factor
):
    device = Device({64: size_curve})
    arrivals = poisson(600, 0.8, device)

    ours = simulate(a_scheduler(device.costs()), arrivals, device)
    theirs = first_come_first_served(arrivals, device)

    assert ours.percentile(0.99, 4) * factor < theirs.percentile(0.99, 4)
    assert ours.percentile(0.5) < theirs.percentile(0.5)
    # the long ones pay little for it
    assert ours.percentile(0.99, 30) < 1.3 * theirs.percentile(0.99, 30)


def test_at_load_1_5_throughput_is_what_batching_gives():
    device = Device({64: GPU_512})
    arrivals = poisson(500, 1.5, device)

    ours = simulate(a_scheduler(device.costs()), arrivals, device)
    theirs = first_come_first_served(arrivals, device)

    assert ours.images_per_s() > 1.4 * theirs.images_per_s()
    assert ours.percentile(0.99, 4) * 20 < theirs.percentile(0.99, 4)


def test_it_learns_the_curve_while_serving_noise_and_late_measurements_included():
    device, noisy = Device({64: GPU_512}), Device({64: GPU_512}, noise=0.2)
    knowing = simulate(a_scheduler(device.costs()), poisson(500, 0.8, device), device)

    learning = simulate(a_scheduler(CostModel()), poisson(500, 0.8, noisy), noisy, lag=2)

    assert learning.percentile(0.99, 4) < 1.3 * knowing.percentile(0.99, 4)
    assert learning.percentile(0.99) < 1.3 * knowing.percentile(0.99)


@pytest.mark.parametrize("decode_steps", [slow(1.0), 3.0])
def test_decoding_all_that_is_denoised_before_the_next_forward_beats_one_decode_between_two(
    decode_steps,
):
    device = Device({64: GPU_512}, decode_steps=decode_steps)

    all_first = simulate(a_scheduler(device.costs()), poisson(600, 1.5, device), device)
    one = simulate(
        a_scheduler(device.costs(), max_decodes_between_steps=1), poisson(600, 1.5, device), device
    )

    assert all_first.percentile(0.5) < one.percentile(0.5)
    assert all_first.percentile(0.99, 4) < 0.7 * one.percentile(0.99, 4)
    assert all_first.images_per_s() > 0.99 * one.images_per_s()


@pytest.mark.parametrize("knee", [1, 4, 8])
def test_forwards_find_the_knee_of_a_noisy_device_and_stay_there(knee):
    def curve(rows):
        return 1 + 0.5 * (min(rows, knee) - 1) + max(0, rows - knee)

    device = Device({64: curve}, noise=0.1)
    images = [
        (0.0, an_image(f"{n}: 30", num_steps=30, guidance=1.0, encoded=False)) for n in range(400)
    ]

    run = simulate(a_scheduler(device.costs()), images, device, until_s=1000 * curve(knee), lag=2)

    rows = Counter(
        work.bucket_rows
        for _, work, _ in run.works[len(run.works) // 4 :]
        if isinstance(work, Batch)
    )
    assert rows[knee] > 0.9 * rows.total()


def test_a_better_rank_hardly_notices_that_the_device_is_full_of_bulk_work():
    device = Device({64: GPU_1024})
    bulk = [(0.0, an_image(f"bulk no{n}", num_steps=30, rank=1, encoded=False)) for n in range(60)]
    interactive = [
        (5.0 + 10 * n, an_image(f"{n}: 4", num_steps=4, guidance=1.0, encoded=False))
        for n in range(40)
    ]

    run = simulate(
        a_scheduler(device.costs()),
        sorted(bulk + interactive, key=lambda arrival: arrival[0]),
        device,
    )

    one_bulk_forward_s = device.forward_s[64](2)
    assert run.latencies(4)[-1] <= device.alone_s(interactive[0][1]) + one_bulk_forward_s + 1e-9


# --- shares ---------------------------------------------------------------------------------------


def seconds_of_ranks(run: Run, from_s: float, to_s: float) -> Counter[int]:
    """Of the work that ended within these."""
    seconds = Counter()
    for ended_at, work, took_s in run.works:
        if from_s < ended_at <= to_s:
            seconds[next(iter(work)).rank] += took_s
    return seconds


@pytest.mark.parametrize("noise", [slow(0.0), 0.4])
def test_ranks_have_their_share_in_every_minute_and_an_endless_better_one_the_rest(
    noise,
):
    device = Device({64: GPU_1024}, noise=noise)
    arrivals = [
        (0.0, an_image(f"{rank} no{n}", rank=rank, num_steps=30, encoded=False))
        for n in range(400)
        for rank in (0, 1, 2)
    ]

    run = simulate(
        a_scheduler(device.costs(), rank_shares={1: 0.15, 2: 0.05}),
        arrivals,
        device,
        until_s=600,
        lag=2,
    )

    forward_s = device.forward_s[64](2) * (1 + noise)
    for start_s in range(0, 540, 10):
        seconds = seconds_of_ranks(run, start_s, start_s + 60)
        assert seconds[1] >= 0.15 * 60 - forward_s
        assert seconds[2] >= 0.05 * 60 - forward_s
    seconds = seconds_of_ranks(run, 0, 600)
    assert seconds[0] / 600 == pytest.approx(0.8, abs=0.01)


def test_a_better_rank_waits_for_one_forward_of_each_worse_one_now_and_then():
    device = Device({64: GPU_1024})
    arrivals = [
        (0.0, an_image(f"{rank} no{n}", rank=rank, num_steps=30))
        for n in range(100)
        for rank in (0, 1, 2)
    ]

    run = simulate(
        a_scheduler(device.costs(), rank_shares={1: 0.15, 2: 0.05}), arrivals, device, until_s=300
    )

    worse = "".join("0" if next(iter(work)).rank == 0 else "1" for _, work, _ in run.works)
    assert max(map(len, worse.split("0"))) <= 2


def test_a_share_nobody_used_is_not_saved_up():
    device = Device({64: GPU_1024})
    urgent = [(0.0, an_image(f"0 no{n}", num_steps=30)) for n in range(100)]
    late = [(200.0, an_image(f"1 no{n}", rank=1, num_steps=30)) for n in range(100)]

    run = simulate(
        a_scheduler(device.costs(), rank_shares={1: 0.15}), urgent + late, device, until_s=400
    )

    assert seconds_of_ranks(run, 200, 220)[1] <= 0.15 * 20
    assert seconds_of_ranks(run, 200, 400)[1] == pytest.approx(0.15 * 200, rel=0.05)


# --- owners ---------------------------------------------------------------------------------------


def light_owners(device: Device, load: float, until_s: float, seed: int = 1) -> Arrivals:
    """Four owners who now and then want an image of the mix."""
    rng = random.Random(seed)
    arrivals = poisson(200, load, device, seed)
    for _, image in arrivals:
        image.request = replace(image.request, owner=f"light {rng.randrange(4)}")
    return [(20.0 + at, image) for at, image in arrivals if 20.0 + at < until_s]


def dumped(count: int = 600) -> Arrivals:
    return [
        (0.0, an_image(f"dump {n}", num_steps=30, encoded=False, owner="dump"))
        for n in range(count)
    ]


def p99_of(run: Run, arrivals: Arrivals) -> float:
    latencies = sorted(run.done_at[image.id] - at for at, image in arrivals)
    return latencies[int(0.99 * (len(latencies) - 1))]


@pytest.mark.parametrize(
    ("curve", "load", "slower"),
    [
        slow(GPU_512, 0.1, 1.15),
        (GPU_512, 0.5, 1.2),
        (GPU_1024, 0.1, 1.1),
        slow(GPU_1024, 0.5, 1.4),
    ],
)
def test_hundreds_of_images_of_one_owner_hardly_slow_the_others_and_use_all_that_is_left(
    curve, load, slower
):
    device = Device({64: curve})
    without = simulate(a_scheduler(device.costs()), light_owners(device, load, 400), device, lag=1)
    light = light_owners(device, load, 400)

    run = simulate(
        a_scheduler(device.costs()),
        sorted(dumped() + light, key=lambda arrival: arrival[0]),
        device,
        until_s=600,
        lag=1,
    )

    assert p99_of(run, light) <= slower * p99_of(without, light)
    # no idle turn
    assert sum(took_s for _, _, took_s in run.works) == pytest.approx(run.works[-1][0])
    assert max(run.parks.values(), default=0) <= 2


@pytest.mark.parametrize(
    ("curve", "load", "loss"),
    [(GPU_512, 0.1, 0.05), slow(GPU_1024, 0.1, 0.05), (GPU_1024, 0.5, 0.05)],
)
def test_the_device_does_as_much_as_if_all_images_were_one_owners(curve, load, loss):
    device = Device({64: curve})
    rows_per_s = []
    for owner in ("dump", "light"):
        light = light_owners(device, load, 400)
        for _, image in light:
            image.request = replace(
                image.request, owner=owner if owner == "dump" else image.request.owner
            )
        arrivals = sorted(dumped() + light, key=lambda arrival: arrival[0])
        run = simulate(a_scheduler(device.costs()), arrivals, device, until_s=400)
        rows_per_s.append(
            sum(work.used_rows for _, work, _ in run.works if isinstance(work, Batch))
            / run.works[-1][0]
        )

    assert rows_per_s[1] >= (1 - loss) * rows_per_s[0]


@pytest.mark.parametrize(("curve", "load"), [slow(GPU_512, 0.8), (GPU_512, 1.5), (GPU_1024, 0.8)])
def test_where_every_image_is_another_owners_all_is_as_if_they_were_of_one(curve, load):
    device = Device({64: curve})
    of_many = poisson(300, load, device)
    for at, image in of_many:
        image.request = replace(image.request, owner=f"owner at {at}")

    run = simulate(a_scheduler(device.costs()), of_many, device)

    assert (
        run.done_at
        == simulate(a_scheduler(device.costs()), poisson(300, load, device), device).done_at
    )
