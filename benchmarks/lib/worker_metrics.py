"""What the device did, from the worker's Prometheus metrics."""

import time
from dataclasses import dataclass

import httpx
from prometheus_client.parser import text_string_to_metric_families

PATIENCE_S = 60
STAGES = ("encode", "denoise", "decode")


@dataclass(frozen=True)
class MetricsSample:
    """The counters at one moment, or what they gained between two."""

    at_s: float
    stage_s: dict[str, float]
    forwards: float
    rows: float  # of all forwards, padding not counted
    inflight: float = 0.0  # images on the device, now

    def __sub__(self, earlier: "MetricsSample") -> "MetricsSample":
        stage_s = {stage: self.stage_s[stage] - earlier.stage_s[stage] for stage in STAGES}
        return MetricsSample(
            self.at_s - earlier.at_s,
            stage_s,
            self.forwards - earlier.forwards,
            self.rows - earlier.rows,
        )

    @property
    def busy_share(self) -> float:
        """Return, of a difference, seconds that the device worked ÷ seconds that passed."""
        return sum(self.stage_s.values()) / self.at_s

    @property
    def mean_rows(self) -> float:
        """Return, of a difference, the rows of a forward that belonged to an image."""
        return self.rows / self.forwards if self.forwards else 0.0


class WorkerMetrics:
    """The worker's /metrics."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/metrics"

    def read(self) -> MetricsSample:
        """Read the counters now.

        KeyError if they are not a worker's, httpx.TransportError if nobody answers.
        """
        answer = httpx.get(self._url, trust_env=False)
        samples = {
            (sample.name, sample.labels.get("stage", "")): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }
        forwards = samples["darkroom_engine_forwards", ""]
        return MetricsSample(
            time.monotonic(),
            {stage: samples["darkroom_engine_seconds", stage] for stage in STAGES},
            forwards,
            forwards * samples["darkroom_engine_mean_rows", ""],
            samples["darkroom_engine_inflight_images", ""],
        )

    def is_there(self) -> bool:
        """Tell whether a worker answers."""
        try:
            self.read()
        except (httpx.TransportError, KeyError):
            return False
        return True

    def wait_there(self) -> None:
        """Return when the worker answers."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.is_there():
            if time.monotonic() > deadline:
                raise SystemExit(f"the worker's metrics are not at {self._url}")
            time.sleep(0.2)

    def wait_idle(self) -> None:
        """Return when no image is on the device."""
        deadline = time.monotonic() + PATIENCE_S
        while self.read().inflight:
            if time.monotonic() > deadline:
                raise SystemExit("the device does not become idle")
            time.sleep(0.1)
