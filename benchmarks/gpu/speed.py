"""Images a second of one model: diffusers' own pipeline, the engine, and its faster variants.

It judges nothing.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from benchmarks.gpu.cells import Cells, Found, Setting, tidy
from benchmarks.gpu.checkpoints import a_request, write_checkpoint
from benchmarks.gpu.launches import Overlap, measure_launches
from benchmarks.gpu.models import VARIANTS, Changes, Model, model_named
from benchmarks.gpu.ours import measure_engine
from benchmarks.gpu.plain import Pixels, PlainPipeline, latencies
from benchmarks.gpu.plan import PARTS, model_of
from benchmarks.gpu.random_networks import forget
from benchmarks.gpu.stepper import Stepper
from engine.config import CheckpointSpec


def speed(part: str, setting: Setting, cells: Cells) -> None:
    """Take the cells of a part that measures one model."""
    of_model = _SpeedCells(model_named(model_of(part), setting), setting)
    measures: dict[str, Callable[[], Found]] = {
        "eager": of_model.beside_plain,
        "plain_batched": of_model.plain_batched,
        "launches": of_model.launches,
        "launches_graphs": partial(of_model.launches, cuda_graphs=True),
        "overlap": of_model.overlap,
        "plain_compiled": of_model.plain_compiled,
    }
    for variant, changes in VARIANTS.items():
        measures[variant] = partial(of_model.variant, changes)
    for cell in PARTS[part].cells:
        cells.take(cell, measures[cell])


class _SpeedCells:
    """One model, one request whose seed is all that differs from image to image."""

    def __init__(self, model: Model, setting: Setting) -> None:
        self._model = model
        self._setting = setting
        self._spec = write_checkpoint(setting.folder, model.family, setting.scale)
        self._request = a_request(self._spec, num_steps=model.num_steps, guidance=model.guidance)

    def beside_plain(self) -> Found:
        """Time plain calls, the engine, and plain calls again: clocks drift.

        Over one copy of the networks.
        """
        model = self._model
        before, pixels = self._plain().measure(model.plain_images)
        ours, our_pixels = self._ours(self._spec, alone=model.alone_images, busy=model.busy_images)
        after, _ = self._plain().measure(model.plain_images)
        plain = before | latencies(before["latencies_s"] + after["latencies_s"])
        # Other kernels, other last bits.
        levels_apart = int(np.abs(pixels.astype(int) - our_pixels.astype(int)).max())
        return {
            "plain": plain,
            "ours": ours,
            "ours_to_plain": ours["images_per_s"] / plain["images_per_s"],
            "levels_apart": levels_apart,
        }

    def plain_batched(self) -> Found:
        """Time a plain call of as many images as share one of our full forwards."""
        batch = self._model.plain_batch
        found, _ = self._plain().measure(1, batch=batch)
        return found | {"images_per_call": batch}

    def variant(self, changes: Changes) -> Found:
        """Time the engine with these changes to its checkpoint.

        Over networks of its own: they are changed in place.
        """
        if "cuda_graphs" in changes:
            self._setting.check_cuda("CUDA graphs")
        changed: dict[str, Any] = dict(changes)
        with _own_networks():
            return self._ours(
                replace(self._spec, **changed),
                alone=self._model.variant_alone_images,
                busy=self._model.variant_busy_images,
            )[0]

    def plain_compiled(self) -> Found:
        """Time plain calls with compiled blocks, over networks of their own."""
        with _own_networks():
            return self._plain(compiled=True).measure(self._model.plain_images)[0]

    def launches(self, **changes: Any) -> Found:
        """Time the host's and the device's part of a forward; `changes` leave networks alone."""
        if "cuda_graphs" in changes:
            self._setting.check_cuda("CUDA graphs")
        spec = replace(self._spec, **changes)
        return measure_launches(spec, self._request, self._model, self._setting.device)

    def overlap(self) -> Found:
        """Time forwards, decodes, and both at once.

        How much of the decodes' time disappears? And do small copies wait for the queue?
        """
        stepper = Stepper(self._spec, self._setting.device)
        is_short = self._setting.tiny or self._setting.quick or self._model.family == "flux"
        overlap = Overlap(stepper, stepper.started(self._request), decodes=2 if is_short else 4)
        return overlap.measure() | (overlap.small_copy() if self._setting.is_cuda else {})

    def _plain(self, *, compiled: bool = False) -> PlainPipeline:
        return PlainPipeline(self._spec, self._request, self._setting.device, compiled=compiled)

    def _ours(self, spec: CheckpointSpec, *, alone: int, busy: int) -> tuple[Found, Pixels]:
        return measure_engine(
            spec,
            self._request,
            self._setting.device,
            max_batch_rows=self._model.max_batch_rows,
            alone=alone,
            busy=busy,
        )


@contextmanager
def _own_networks() -> Iterator[None]:
    """Draw networks anew within it; nobody sees them after it."""
    forget()
    tidy()
    try:
        yield
    finally:
        forget()
