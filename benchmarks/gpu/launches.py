"""What of a forward is the host's time and what the device's, and what runs beside what.

A forward that takes longer to launch than to compute gains by CUDA graphs; any other by kernels.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from benchmarks.gpu.cells import Found
from benchmarks.gpu.models import Model
from benchmarks.gpu.stepper import Stepper
from engine.config import CheckpointSpec
from engine.inflight import InFlight
from engine.request import ImageRequest
from engine.scheduler import Batch
from engine.transfers import to_device

REPEATS = 3
FORWARDS_PER_DECODE = 5


def full_batch(stepper: Stepper, request: ImageRequest, rows: int) -> Batch:
    """Start as many images as fill so many rows, each with noise of its own."""
    images = [stepper.started(request)]
    while (len(images) + 1) * images[0].rows <= rows:
        number = len(images)
        images.append(stepper.started(replace(request, id=f"{request.id} {number}", seed=number)))
    return Batch(tuple(images), rows)


def measure_launches(
    spec: CheckpointSpec, request: ImageRequest, model: Model, device: str
) -> Found:
    """Time the launch of a forward and the device's work on it apart.

    By rows: those of one image and of a full forward.
    """
    stepper = Stepper(spec, device)
    full = full_batch(stepper, request, model.max_batch_rows)
    one = Batch((full.images[0],), model.rows)
    return {str(each.bucket_rows): _forward(stepper, each) for each in (one, full)}


def _forward(stepper: Stepper, batch: Batch) -> dict[str, float | None]:
    """Return the median seconds of launching a forward into an idle device, and of its work.

    A CPU computes while it is called: nothing is told of its launches.
    """
    launches_s, devices_s = [], []
    for _ in range(1 + REPEATS):
        stepper.wait()
        started = time.perf_counter()
        watch = stepper.device.stopwatch()
        stepper.runner.predict(batch)
        watch.stop()
        launches_s.append(time.perf_counter() - started)
        devices_s.append(watch.span().seconds)
    launch_s = statistics.median(launches_s[1:])
    device_s = statistics.median(devices_s[1:])
    return {"launch_s": launch_s if stepper.device.is_cuda else None, "device_s": device_s}


class Overlap:
    """Forwards and decodes of one image, on a device that does nothing else."""

    def __init__(self, stepper: Stepper, image: InFlight, *, decodes: int) -> None:
        self._stepper = stepper
        self._image = image
        self._batch = Batch.alone(image)
        self._decodes = decodes

    def measure(self) -> Found:
        """Time forwards, decodes and both; the first time, in which kernels are chosen, is not."""
        self._timed(self._both)
        forwards_s = self._timed(self._forwards)
        both_s = self._timed(self._both)
        decodes_s = self._timed(self._decode_all)
        return {
            "forwards": self._decodes * FORWARDS_PER_DECODE,
            "decodes": self._decodes,
            "forwards_s": forwards_s,
            "decodes_s": decodes_s,
            "both_s": both_s,
            "hidden_share": (forwards_s + decodes_s - both_s) / decodes_s,
        }

    def small_copy(self) -> Found:
        """Time the launch of a small copy behind some forwards, and what is left of these then."""
        for _ in range(3):
            self._stepper.runner.predict(self._batch)
        launched = time.perf_counter()
        to_device(torch.zeros(4), self._stepper.device.torch_device)  # as timesteps are
        copied = time.perf_counter()
        self._stepper.wait()
        return {
            "small_copy_s": copied - launched,
            "queue_behind_small_copy_s": time.perf_counter() - copied,
        }

    def _timed(self, work: Callable[[], None]) -> float:
        self._stepper.wait()
        started = time.perf_counter()
        work()
        self._stepper.wait()
        return time.perf_counter() - started

    def _forwards(self) -> None:
        for _ in range(self._decodes * FORWARDS_PER_DECODE):
            self._stepper.runner.predict(self._batch)

    def _both(self) -> None:
        for _ in range(self._decodes):
            self._stepper.runner.decode(self._image)
            for _ in range(FORWARDS_PER_DECODE):
                self._stepper.runner.predict(self._batch)

    def _decode_all(self) -> None:
        for _ in range(self._decodes):
            self._stepper.runner.decode(self._image)
