"""How long fast jobs wait for a worker while bursts of large jobs come, workers restart with a backlog, and the pool shrinks.

    python -m benchmarks.bursts [--quick]

One CPU worker of a house of its own, a second one for the last scene. One tenant sends batches of 6 batch and 6 quality jobs of 8 images,
in one request; another asks for a fast job now and then. A wait is accepted to lease, by the database's own timestamps; of a job that
expired, accepted to expired.

Idle     The worker has nothing else to do: what a lease takes.
Burst    One batch; fast jobs until all of it is rendered, or for `probe_s`.
Restart  Two batches; the worker is told to end with all it can hold in hand, all of which comes back at once when it is there again. Fast
         jobs from the moment on that it takes any.
Scale    Two batches; a second worker starts, takes its part, and is told to end: all it had comes to the first one. Fast jobs all the time.

The p99 wait of each may be 1.1 times a denoise step, as the first worker made them meanwhile, plus what a lease takes on the idle worker.
"""

import argparse
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.serving.cells import percentile
from benchmarks.sharing.arrivals import wishes
from benchmarks.sharing.house import House, running_house
from benchmarks.sharing.verdict import Target, report

TENANTS = ("fast", "bulk")
BULK_TIERS = ("batch", "quality")
JOBS_OF_EACH, IMAGES, STEPS = 6, 8, 20
FAST_STEPS = 4
STEPS_ALLOWED = 1.1
UP_WITHIN_S = 120


@dataclass(frozen=True)
class Extent:
    """How much is measured."""

    idle_jobs: int
    gap_s: float  # between two fast jobs
    probe_s: float  # of each scene, or of each part of it
    scenes: tuple[str, ...]


FULL = Extent(idle_jobs=20, gap_s=0.5, probe_s=30.0, scenes=("burst", "restart", "scale"))
QUICK = Extent(idle_jobs=5, gap_s=0.5, probe_s=10.0, scenes=("burst",))


@dataclass
class Scene:
    """What fast jobs met."""

    waits_s: list[float] = field(default_factory=list)
    latencies_s: list[float] = field(default_factory=list)
    expired: int = 0
    step_s: float = 0.0  # mean forward of the first worker
    most_held: dict[str, int] = field(default_factory=dict)  # unrendered images of running jobs of one worker, by tier

    def p99_s(self) -> float:
        """Of the waits."""
        return percentile(self.waits_s, 0.99)


@dataclass
class Stage:
    """The house, and who asks."""

    house: House
    extent: Extent
    scenes: dict[str, Scene] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._fast = wishes("fast", FAST_STEPS, seed=0)
        self._bulk = {tier: wishes(tier, STEPS, seed=number) for number, tier in enumerate(BULK_TIERS, start=1)}

    def idle(self) -> None:
        """Fast jobs, and nobody else."""
        with self._watched("idle") as probe:
            for _ in range(self.extent.idle_jobs):
                probe()
                time.sleep(self.extent.gap_s)

    def burst(self) -> None:
        """One burst."""
        with self._watched("burst") as probe:
            self._send_burst()
            self._probe_for(self.extent.probe_s, probe)

    def restart(self) -> None:
        """The worker ends and comes back to all it had."""
        stack = self.house.stack
        self._send_burst()
        self._send_burst()
        self._wait_for(lambda: self._held().get("worker-1", 0) > self.house.pool.slots, "the worker has not taken its part")
        stack.stop("worker-1")
        stack.start("worker-1")
        self._wait_for(lambda: self._held().get("worker-1", 0) > 0, "the worker is not back")
        with self._watched("restart") as probe:
            self._probe_for(self.extent.probe_s, probe)

    def scale(self) -> None:
        """From one worker to two and back."""
        stack = self.house.stack
        self._send_burst()
        self._send_burst()
        with self._watched("scale") as probe:
            stack.start("worker-2")
            is_busy = threading.Event()

            def look() -> None:
                self._wait_for(lambda: self._held().get("worker-2", 0) > self.house.pool.slots // 2, "the second worker takes nothing")
                is_busy.set()

            looking = threading.Thread(target=look, daemon=True)
            looking.start()
            while not is_busy.is_set() and looking.is_alive():
                self._probe_for(self.extent.gap_s, probe)
            ending = threading.Thread(target=stack.stop, args=["worker-2"], daemon=True)
            ending.start()
            self._probe_for(self.extent.probe_s, probe)
            ending.join()

    def clear(self) -> None:
        """Cancel what is left; return when the device is idle."""
        self.house.clear("bulk")

    def _send_burst(self) -> None:
        jobs = [self._bulk[tier]() | {"n": IMAGES} for _ in range(JOBS_OF_EACH) for tier in BULK_TIERS]
        self.house.doors["bulk"].ask_for_all(jobs)

    def _probe_for(self, seconds: float, probe: Callable[[], None]) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            probe()
            time.sleep(self.extent.gap_s)

    @contextmanager
    def _watched(self, name: str) -> Iterator[Callable[[], None]]:
        """What asks for one fast job; afterwards it is known what became of all of them."""
        job_ids: list[str] = []
        before = self.house.meter.read()
        scene = self.scenes[name] = Scene()

        def probe() -> None:
            self._wait_for(self._has_room, "fast jobs do not end")
            job_id = self.house.doors["fast"].ask(self._fast())
            assert job_id is not None
            job_ids.append(job_id)
            for tier, images in self.house.ledger.held_of_one_worker().items():
                scene.most_held[tier] = max(scene.most_held.get(tier, 0), images)

        yield probe
        gained = self.house.meter.read() - before
        scene.step_s = gained.stage_s["denoise"] / max(1.0, gained.forwards)
        self.house.ledger.wait_served(job_ids)
        ends = self.house.ledger.waits(job_ids)
        scene.waits_s, scene.latencies_s = [end.wait_s for end in ends], [end.total_s for end in ends]
        scene.expired = sum(end.state == "expired" for end in ends)
        _say(f"{name}: {len(ends)} fast jobs, p99 wait {scene.p99_s():.3f} s, longest {max(scene.waits_s):.3f} s")

    def _has_room(self) -> bool:
        """Do fast jobs leave slots to the next one? Else they would wait for each other, which is not what is measured."""
        return self.house.ledger.levels(["fast"]).unfinished.get("fast", 0) < self.house.pool.slots // 2

    def _held(self) -> dict[str, int]:
        return self.house.ledger.held_by_worker()

    def _wait_for(self, happens: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + UP_WITHIN_S
        while not happens():
            if time.monotonic() > deadline:
                raise SystemExit(otherwise)
            time.sleep(0.1)


def main() -> int:
    """Measure, print a table and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the burst alone; ends within a minute")
    options = parser.parse_args()
    extent = QUICK if options.quick else FULL
    with running_house(TENANTS, workers=2 if "scale" in extent.scenes else 1) as house:
        stage = Stage(house, extent)
        if "scale" in extent.scenes:
            house.stack.stop("worker-2")
        for name in ("idle", *extent.scenes):
            getattr(stage, name)()
            stage.clear()
    return _report(stage, quick=options.quick)


def _report(stage: Stage, *, quick: bool) -> int:
    lease_s = stage.scenes["idle"].p99_s()
    table = Table(title="Fast jobs: seconds from accepted to leased")
    table.caption = f"allowed: {STEPS_ALLOWED} x a step + {lease_s * 1000:.0f} ms for a lease"
    for column in ("", "jobs", "p50", "p99", "longest", "allowed", "expired", "to the end, p99", "most held of other tiers"):
        table.add_column(column, justify="right" if column else "left")
    figures: dict[str, Any] = {"lease_p99_s": lease_s}
    targets = []
    for name, scene in stage.scenes.items():
        allowed_s = STEPS_ALLOWED * scene.step_s + lease_s
        seconds = (statistics.median(scene.waits_s), scene.p99_s(), max(scene.waits_s), allowed_s)
        held = ", ".join(f"{tier} {images}" for tier, images in sorted(scene.most_held.items()) if tier != "fast")
        texts = [f"{some_s:.3f}" for some_s in seconds]
        table.add_row(name, str(len(scene.waits_s)), *texts, str(scene.expired), f"{percentile(scene.latencies_s, 0.99):.3f}", held)
        if name != "idle":
            figures |= {f"{name}_wait_p99_s": scene.p99_s(), f"{name}_step_s": scene.step_s}
            figures |= {f"{name}_expired": scene.expired, f"{name}_most_held": scene.most_held}
            said = f"{STEPS_ALLOWED} x a step + a lease = {allowed_s:.3f}"
            targets += [Target(f"{name}_wait_p99_s", "<=", allowed_s, said), Target(f"{name}_expired", "<=", 0)]
    Console().print(table)
    facts = {"slots": stage.house.pool.slots, "fast_jobs": {name: len(scene.waits_s) for name, scene in stage.scenes.items()}}
    return report("bursts", figures, targets, {}, facts | {"device": "cpu", "quick": quick})


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
