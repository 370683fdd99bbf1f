"""The scenes: what happens to the worker while a tenant asks for fast jobs now and then."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from benchmarks.lib.load import equal_jobs
from benchmarks.lib.measured_stack import MeasuredStack
from benchmarks.lib.progress import log_progress
from benchmarks.lib.statistics import percentile

TENANTS = ("fast", "bulk")
BULK_TIERS = ("batch", "quality")
JOBS_OF_EACH = 6  # bulk tiers, in a burst
IMAGES = 8
STEPS = 20
FAST_STEPS = 4
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
    # Unrendered images of running jobs of one worker, by tier.
    most_held: dict[str, int] = field(default_factory=dict)

    def p99_s(self) -> float:
        """Return the p99 of the waits."""
        return percentile(self.waits_s, 0.99)


class Scenes:
    """Plays one scene after the other on a stack. `played`: what fast jobs met, by scene."""

    def __init__(self, measured: MeasuredStack, extent: Extent) -> None:
        self.played: dict[str, Scene] = {}
        self._measured = measured
        self._stack = measured.stack
        self._extent = extent
        self._next_fast = equal_jobs("fast", FAST_STEPS, seed=0)
        self._next_bulk = {
            tier: equal_jobs(tier, STEPS, seed=number)
            for number, tier in enumerate(BULK_TIERS, start=1)
        }

    def play(self) -> None:
        """Play all scenes; between two of them everything is canceled."""
        play_by_name = {"burst": self._burst, "restart": self._restart, "scale": self._scale}
        if "scale" in self._extent.scenes:
            self._stack.stop("worker-2")
        for play in (self._idle, *(play_by_name[name] for name in self._extent.scenes)):
            play()
            self._measured.clear("bulk")

    def _idle(self) -> None:
        """Ask for fast jobs, and nothing else."""
        with self._watched("idle") as probe:
            for _ in range(self._extent.idle_jobs):
                probe()
                time.sleep(self._extent.gap_s)

    def _burst(self) -> None:
        """Send one burst."""
        with self._watched("burst") as probe:
            self._send_burst()
            self._probe_for(self._extent.probe_s, probe)

    def _restart(self) -> None:
        """Restart the worker; it comes back to all it had."""
        slots = self._measured.pool.slots
        self._send_burst()
        self._send_burst()
        self._wait_for(lambda: self._held("worker-1") > slots, "the worker has not taken its part")
        self._stack.stop("worker-1")
        self._stack.start("worker-1")
        self._wait_for(lambda: self._held("worker-1") > 0, "the worker is not back")
        with self._watched("restart") as probe:
            self._probe_for(self._extent.probe_s, probe)

    def _scale(self) -> None:
        """Go from one worker to two and back."""
        self._send_burst()
        self._send_burst()
        with self._watched("scale") as probe:
            self._stack.start("worker-2")
            is_busy = threading.Event()
            looking = threading.Thread(target=self._look_if_busy, args=[is_busy], daemon=True)
            looking.start()
            while not is_busy.is_set() and looking.is_alive():
                self._probe_for(self._extent.gap_s, probe)
            ending = threading.Thread(target=self._stack.stop, args=["worker-2"], daemon=True)
            ending.start()
            self._probe_for(self._extent.probe_s, probe)
            ending.join()

    def _look_if_busy(self, is_busy: threading.Event) -> None:
        """Set the event when the second worker has half of its slots taken."""
        enough = self._measured.pool.slots // 2
        self._wait_for(lambda: self._held("worker-2") > enough, "the second worker takes nothing")
        is_busy.set()

    def _send_burst(self) -> None:
        jobs = [
            self._next_bulk[tier]() | {"n": IMAGES}
            for _ in range(JOBS_OF_EACH)
            for tier in BULK_TIERS
        ]
        self._measured.clients["bulk"].submit_batch(jobs)

    def _probe_for(self, seconds: float, probe: Callable[[], None]) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            probe()
            time.sleep(self._extent.gap_s)

    @contextmanager
    def _watched(self, name: str) -> Iterator[Callable[[], None]]:
        """Yield what asks for one fast job; then find out what became of all of them."""
        measured = self._measured
        job_ids: list[str] = []
        before = measured.metrics.read()
        scene = Scene()
        self.played[name] = scene

        def probe() -> None:
            self._wait_for(self._has_room, "fast jobs do not end")
            job_id = measured.clients["fast"].submit(self._next_fast())
            assert job_id is not None
            job_ids.append(job_id)
            for tier, images in measured.queries.held_of_one_worker().items():
                scene.most_held[tier] = max(scene.most_held.get(tier, 0), images)

        yield probe
        gained = measured.metrics.read() - before
        scene.step_s = gained.stage_s["denoise"] / max(1.0, gained.forwards)
        measured.queries.wait_served(job_ids)
        waits = measured.queries.waits(job_ids)
        scene.waits_s = [wait.wait_s for wait in waits]
        scene.latencies_s = [wait.total_s for wait in waits]
        scene.expired = sum(wait.state == "expired" for wait in waits)
        log_progress(
            f"{name}: {len(waits)} fast jobs, p99 wait {scene.p99_s():.3f} s, "
            f"longest {max(scene.waits_s):.3f} s"
        )

    def _has_room(self) -> bool:
        """Tell whether fast jobs leave slots to the next one.

        Else they would wait for each other, which is not what is measured.
        """
        unfinished = self._measured.queries.levels(["fast"]).unfinished.get("fast", 0)
        return unfinished < self._measured.pool.slots // 2

    def _held(self, worker: str) -> int:
        return self._measured.queries.held_by_worker().get(worker, 0)

    def _wait_for(self, happens: Callable[[], bool], otherwise: str) -> None:
        deadline = time.monotonic() + UP_WITHIN_S
        while not happens():
            if time.monotonic() > deadline:
                raise SystemExit(otherwise)
            time.sleep(0.1)
