"""Render images before the first request arrives.

This chooses kernels, lays out memory, and measures the curve of seconds by rows.

Done on the engine's thread: at once before it takes requests, and in pieces between its turns for a
checkpoint that comes later. `./darkroom calibrate` is the same with more repeats, its curve written
down.
"""

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from engine.config import CheckpointSpec, doublings
from engine.costs import CostModel
from engine.device import Device, is_out_of_memory
from engine.errors import UnsupportedRequest
from engine.inflight import InFlight
from engine.request import ImageRequest, Picture
from engine.runner import Runner
from engine.scheduler import Batch

# The steps of a sampler's first use: the methods of higher order begin with the third.
SAMPLER_STEPS = 4


@dataclass(frozen=True, kw_only=True)
class _WarmUp:
    """What the warm-up of one checkpoint works with."""

    spec: CheckpointSpec
    validated: Callable[[ImageRequest], InFlight]
    runner: Runner
    device: Device
    costs: CostModel
    repeats: int
    weights_bytes: int


def warm_up(
    spec: CheckpointSpec,
    *,
    validated: Callable[[ImageRequest], InFlight],
    runner: Runner,
    device: Device,
    costs: CostModel,
    max_batch_rows: int,
    row_buckets: tuple[int, ...] = (),
    repeats: int = 1,
    weights_bytes: int = 0,
    is_brief: bool = False,
) -> Iterator[None]:
    """Render an image of every size, with and without guidance, and make a forward of every bucket.

    Those that requests pin are among them. A picture of every size is encoded where one may be
    given, and every sampler makes some steps: its first one may load a library. Yields after each
    piece of work: an encode, the forwards of one bucket, a step or a decode. What `costs` does not
    know yet is measured, `repeats` times.

    weights_bytes: of all checkpoints; the memory that is measured is what comes on top.  is_brief:
    render one image of the first size, with the smallest forwards; the rest is learnt from what is
    asked for. Raises `UnsupportedRequest` for a checkpoint that offers no size or no sampler, or
    one that nobody could use.
    """
    if not spec.samplers or not spec.sizes:
        raise UnsupportedRequest(
            "samplers" if spec.sizes else "sizes", f"checkpoint {spec.name} offers none"
        )
    work = _WarmUp(
        spec=spec,
        validated=validated,
        runner=runner,
        device=device,
        costs=costs,
        repeats=repeats,
        weights_bytes=weights_bytes,
    )
    for place, (width_px, height_px) in enumerate(spec.sizes):
        is_first = place == 0
        request = _as_it_can_be_rendered(_plain_request(spec, width_px, height_px), validated)
        others = [validated(_of_sampler(request, sampler)) for sampler in spec.samplers]
        pinned = spec.pinned_rows.get((width_px, height_px), ())
        buckets = sorted({*(row_buckets or doublings(max_batch_rows)), *pinned})
        guidances = (1.0, 2.0) if max_batch_rows > 1 else (1.0,)
        images = [validated(replace(request, guidance=guidance)) for guidance in guidances]
        if is_brief:
            if is_first:
                # One row is compiled by itself, and all larger numbers together.
                least = buckets[: 2 if spec.compile_blocks else 1]
                yield from _render(work, images[0], least)
            continue
        encode_bytes = yield from _encode_picture(work, request)
        for image in images:
            fitting = [rows for rows in buckets if rows >= image.rows]
            tried = others if is_first and image is images[0] else []
            yield from _render(work, image, fitting, others=tried, encode_bytes=encode_bytes)


def _plain_request(spec: CheckpointSpec, width_px: int, height_px: int) -> ImageRequest:
    return ImageRequest(
        id="warm-up",
        group="warm-up",
        checkpoint=spec.name,
        prompt="",
        width_px=width_px,
        height_px=height_px,
        num_steps=2,
        guidance=1.0,
        sampler=spec.default_sampler or spec.samplers[0],
        seed=0,
    )


def _as_it_can_be_rendered(
    request: ImageRequest, validated: Callable[[ImageRequest], InFlight]
) -> ImageRequest:
    """Give the request, with a grey picture wherever this checkpoint serves none without."""
    grey = np.full((request.height_px, request.width_px, 3), 128, np.uint8)
    pictures: dict[str, Any] = {
        "init_image": Picture(grey),
        "mask": Picture(grey[..., 0]),
        "control_image": Picture(grey),
    }
    while True:
        try:
            validated(request)
            return request
        except UnsupportedRequest as refused:
            if refused.field not in pictures:
                raise
            given = {refused.field: pictures.pop(refused.field)}
            if refused.field == "mask" and "init_image" in pictures:
                given["init_image"] = pictures.pop("init_image")  # a mask alone is refused as well
            request = replace(request, **given)


def _of_sampler(request: ImageRequest, sampler: str) -> ImageRequest:
    return replace(request, sampler=sampler, num_steps=SAMPLER_STEPS)


def _encode_picture(work: _WarmUp, request: ImageRequest) -> Generator[None, None, int]:
    """Start an image from a picture; return the bytes that took, 0 where none may be given.

    A VAE encodes in a precision of its own, with other kernels, and in more memory than a prompt.
    """
    grey = np.full((request.height_px, request.width_px, 3), 128, np.uint8)
    try:
        image = work.validated(replace(request, init_image=Picture(grey), strength=1.0))
    except UnsupportedRequest:
        return 0
    base_bytes = work.device.memory_bytes()
    work.device.forget_peak()
    try:
        work.runner.start(image)
    except Exception as problem:
        if not is_out_of_memory(problem):
            raise
        work.device.free_cached_memory()  # images without a picture may fit
    finally:
        work.runner.release(image)
    yield
    return work.device.peak_bytes() - base_bytes


def _render(
    work: _WarmUp,
    image: InFlight,
    buckets: list[int],
    *,
    others: Sequence[InFlight] = (),
    encode_bytes: int = 0,
) -> Iterator[None]:
    """Render one image to its end, with a forward of every bucket before its first step.

    others: images like it of other samplers, of which some steps are made with its prediction.
    """
    runner = work.runner
    device = work.device
    costs = work.costs
    try:
        runner.start(image)
        yield
        key = image.batch_key
        # A plain pipeline calls its own denoiser, elsewhere.
        is_known = costs.is_measured(key) or key.call.startswith("alone ")
        base_bytes = device.memory_bytes()
        repeats = 0 if is_known else work.repeats
        peaks = yield from _try_buckets(image, runner, device, costs, buckets, repeats)
        prediction = None
        # Of a number of rows that was tried: cuda_graphs would record one more.
        batch = Batch((image,), buckets[0] if buckets else image.rows)
        while not image.is_denoised:
            yield
            prediction = runner.predict(batch)[0]
            runner.advance(image, prediction)
        if not key.call:
            yield from _try_samplers(runner, others, prediction)
        yield
        device.forget_peak()
        costs.observe_decode(key, runner.decode(image).watch.span().seconds)
        if base_bytes and len(peaks) > 1:
            costs.observe_memory(
                key,
                fixed_bytes=base_bytes - work.weights_bytes,
                per_row_bytes=_bytes_per_row(peaks),
                decode_bytes=device.peak_bytes() - base_bytes,
                encode_bytes=encode_bytes,
            )
    finally:
        runner.release(image)


def _try_samplers(runner: Runner, images: Sequence[InFlight], prediction: Any) -> Iterator[None]:
    """Make the first steps of each image, always with the same prediction."""
    for image in images:
        yield
        try:
            runner.start(image)
            while not image.is_denoised:
                runner.rehearse(image, prediction)
        finally:
            runner.release(image)


def _try_buckets(
    image: InFlight,
    runner: Runner,
    device: Device,
    costs: CostModel,
    buckets: list[int],
    repeats: int,
) -> Generator[None, None, dict[int, int]]:
    """Measure a forward of every bucket that fits, `repeats` times; return their peak bytes.

    Yields between two buckets: the first forward of each may record or compile.
    """
    peaks: dict[int, int] = {}
    for rows in buckets:
        if peaks:
            yield
        batch = Batch(_copies(image, rows), rows)
        device.forget_peak()
        try:
            runner.predict(batch)
        except Exception as problem:
            if rows == buckets[0] or not is_out_of_memory(problem):
                raise
            device.free_cached_memory()
            break  # larger ones do not fit either
        for _ in range(repeats):
            costs.observe_step(image.batch_key, rows, _seconds_of_forward(batch, runner, device))
        peaks[rows] = device.peak_bytes()
    return peaks


def _copies(image: InFlight, rows: int) -> tuple[InFlight, ...]:
    """Return the image as often as fits into so many rows.

    Rows of zeros are quicker: a GPU switches fewer transistors and keeps a higher clock, up to 13 %
    on an H200. An image that runs as a coroutine of its pipeline is in a forward once.
    """
    return (image,) * (1 if image.batch_key.call else max(1, rows // image.rows))


def _seconds_of_forward(batch: Batch, runner: Runner, device: Device) -> float:
    watch = device.stopwatch()
    runner.predict(batch)
    watch.stop()
    return watch.span().seconds


def _bytes_per_row(peaks: dict[int, int]) -> int:
    """Return what one more row takes. peaks: bytes by rows of a forward, of two sizes at least."""
    least = min(peaks)
    most = max(peaks)
    return (peaks[most] - peaks[least]) // (most - least)
