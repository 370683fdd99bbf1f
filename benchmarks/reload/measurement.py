"""Steps of an image that is always in flight, while another checkpoint comes and goes or not."""

import itertools
import time
from collections import defaultdict
from dataclasses import dataclass, field

from benchmarks.lib.statistics import percentile
from engine.config import CheckpointSpec
from engine.engine import Engine
from engine.events import EngineEvent, Stepped
from engine.handle import Handle
from engine.request import ImageRequest

QUIET = "quiet"
RELOADING = "reloading"
NUM_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured."""

    rounds: int  # each a stretch without a load and one with a load and an unload
    quiet_steps: int  # of the first


FULL = Extent(rounds=6, quiet_steps=1500)
QUICK = Extent(rounds=1, quiet_steps=600)


@dataclass
class Findings:
    """What was measured. step_s: of each stretch, by phase."""

    step_s: dict[str, list[list[float]]] = field(default_factory=lambda: defaultdict(list))
    read_s: list[float] = field(default_factory=list)
    warm_up_s: list[float] = field(default_factory=list)
    unload_s: list[float] = field(default_factory=list)

    def ratio(self, share: float) -> float:
        """Return a percentile of the steps beside reloads ÷ that of the quiet ones."""
        return self.step_percentile(RELOADING, share) / self.step_percentile(QUIET, share)

    def step_percentile(self, phase: str, share: float) -> float:
        """Return a percentile of all steps of a phase."""
        return percentile(list(itertools.chain(*self.step_s[phase])), share)


class Steps:
    """An image in flight at any time, and the seconds between two of its steps."""

    def __init__(self, engine: Engine, checkpoint: CheckpointSpec) -> None:
        self._engine = engine
        self._checkpoint = checkpoint
        self._numbers = itertools.count()
        self._stepped_at: float | None = None
        self._seconds: list[float] = []
        self._is_over = False
        self._last: Handle | None = None
        self._submit()

    def take(self) -> list[float]:
        """Take the steps since the last call."""
        taken = self._seconds
        self._seconds = []
        return taken

    def wait_for(self, steps: int) -> None:
        """Wait until so many steps can be taken."""
        while len(self._seconds) < steps:
            time.sleep(0.05)

    def close(self) -> None:
        """End the image."""
        self._is_over = True
        if self._last is not None:
            self._last.cancel()

    def _submit(self) -> None:
        width_px, height_px = self._checkpoint.sizes[0]
        request = ImageRequest(
            id=f"image {next(self._numbers)}",
            group="benchmark",
            checkpoint=self._checkpoint.name,
            prompt="a red circle",
            width_px=width_px,
            height_px=height_px,
            num_steps=NUM_STEPS,
            guidance=4.0,
            sampler=self._checkpoint.samplers[0],
            seed=1,
        )
        self._stepped_at = None
        self._last = self._engine.submit(request, self._on_event)

    def _on_event(self, event: EngineEvent) -> None:
        if not isinstance(event, Stepped):
            return
        now = time.perf_counter()
        if self._stepped_at is not None:
            self._seconds.append(now - self._stepped_at)
        self._stepped_at = now
        if event.step == event.num_steps and not self._is_over:
            self._submit()


def measure(engine: Engine, own: CheckpointSpec, other: CheckpointSpec, extent: Extent) -> Findings:
    """Take turns of quiet steps and of steps beside a load and an unload."""
    findings = Findings()
    steps = Steps(engine, own)
    steps.wait_for(50)
    for _ in range(extent.rounds):
        steps.take()
        steps.wait_for(extent.quiet_steps)
        findings.step_s[QUIET].append(steps.take())
        times = engine.load(other).result()
        unloading_at = time.perf_counter()
        engine.unload(other.name).result()
        findings.step_s[RELOADING].append(steps.take())
        findings.read_s.append(times.read_s)
        findings.warm_up_s.append(times.warm_up_s)
        findings.unload_s.append(time.perf_counter() - unloading_at)
    steps.close()
    return findings
