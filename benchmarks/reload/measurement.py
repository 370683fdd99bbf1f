"""Steps of an image that is always in flight, while another checkpoint comes and goes or not."""

import itertools
import time
from dataclasses import dataclass

from benchmarks.reload.findings import Findings
from engine.config import CheckpointSpec
from engine.engine import Engine
from engine.events import EngineEvent, Stepped
from engine.handle import Handle
from engine.request import ImageRequest

NUM_STEPS = 100


@dataclass(frozen=True, kw_only=True)
class Extent:
    """How much is measured."""

    reloads: int
    quiet_steps: int  # before the first, and after each


FULL = Extent(reloads=8, quiet_steps=1200)
QUICK = Extent(reloads=2, quiet_steps=300)


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

    def be_quiet() -> None:
        steps.take()
        steps.wait_for(extent.quiet_steps)
        findings.quiet_s.append(steps.take())

    be_quiet()
    for _ in range(extent.reloads):
        times = engine.load(other).result()
        unloading_at = time.perf_counter()
        engine.unload(other.name).result()
        findings.unload_s.append(time.perf_counter() - unloading_at)
        findings.reloading_s.append(steps.take())
        findings.read_s.append(times.read_s)
        findings.warm_up_s.append(times.warm_up_s)
        be_quiet()
    steps.close()
    return findings
