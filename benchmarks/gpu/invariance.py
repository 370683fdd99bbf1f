"""Is an image the same with other neighbours, elsewhere in its bucket, and in another engine?

To the bit, by dtype and kernel. What an image is compared by are the latents of every step, the
state that is saved, and the decoded pixels. It judges nothing.
"""

import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.gpu.cells import Cells, Found, Setting, tidy
from benchmarks.gpu.checkpoints import a_request, write_checkpoint
from benchmarks.gpu.plan import PARTS, changes_of
from benchmarks.gpu.random_networks import forget
from benchmarks.gpu.stepper import Stepper
from engine.config import CheckpointSpec, EngineConfig
from engine.engine import Engine
from engine.events import EngineEvent, Stepped
from engine.inflight import InFlight
from engine.request import Determinism, ImageRequest
from engine.snapshots import from_bytes

BUCKET_ROWS = 8
STEPS = 6
SAVED_AFTER = 3  # steps
LOOKED_AT_AFTER = 5  # steps
PATIENCE_S = 600  # for one image


def invariance(setting: Setting, cells: Cells) -> None:
    """Take a cell for every family, precision and kernel, and what makes a checkpoint faster."""
    for name in PARTS["invariance"].cells:
        cells.take(name, partial(_bits, name, setting))


def _bits(name: str, setting: Setting) -> Found:
    family, precision, kernel, *words = name.split()
    if "cuda_graphs" in words:
        setting.check_cuda("CUDA graphs")
    forget()
    scale = "tiny" if setting.tiny else "small"
    spec = write_checkpoint(setting.folder, family, scale, precision=precision, **changes_of(words))
    stepper = Stepper(spec, setting.device, attention=kernel)
    found: Found = {
        "kernel": kernel_for_heads(stepper),
        "apart_in_company": apart_in_company(stepper, spec),
    }
    del stepper
    found["apart_after_resume"] = apart_after_resume(spec, setting.device, kernel)
    forget()
    return found | {
        "invariant": found["apart_in_company"] == 0,
        "resumed": found["apart_after_resume"] == 0,
    }


def kernel_for_heads(stepper: Stepper) -> str:
    """Return the attention kernel that runs for heads of 64 as the engine has set it up.

    The plain one where the pinned one cannot.
    """
    family: Any = stepper.loaded.family
    heads = torch.randn(2, 4, 256, 64, device=stepper.device.torch_device, dtype=family.dtype)
    return str(SDPBackend(torch._fused_sdp_choice(heads, heads, heads)).name).lower()


def apart_in_company(stepper: Stepper, spec: CheckpointSpec) -> float:
    """Return the largest difference between an image alone in its bucket and beside others.

    In row 0 and elsewhere. 0: not a bit. At every step other strangers are there, each at a step of
    its own, some guided, some not. Raises `AssertionError` when another seed gives the same
    latents, for nothing is shown then.
    """
    request = a_request(spec, num_steps=STEPS, guidance=4.0, sampler=spec.samplers[-1], seed=7)
    strangers = [stepper.started(_stranger(request, n, spec)) for n in range(5)]
    for n, stranger in enumerate(strangers):
        for _ in range(n):
            stepper.step(stranger, bucket_rows=BUCKET_ROWS)
    dice = random.Random(0)

    def behind(image: InFlight) -> list[InFlight]:
        """Put the image in the first rows, then as many strangers as there is room for."""
        images = [image]
        for stranger in dice.sample(strangers, dice.randint(1, len(strangers))):
            if sum(other.rows for other in images) + stranger.rows <= BUCKET_ROWS:
                images.append(stranger)
        return images

    def amidst(image: InFlight) -> list[InFlight]:
        """Put the image anywhere among them."""
        images = behind(image)
        dice.shuffle(images)
        return images

    alone = _latents_and_pixels(stepper, request, lambda image: [image])
    other = _latents_and_pixels(stepper, replace(request, seed=8), lambda image: [image])
    assert not torch.equal(alone[0], other[0]), "another seed gives the same latents"
    return max(
        apart(alone, _latents_and_pixels(stepper, request, among))
        for among in (behind, amidst, behind)
    )


def _stranger(request: ImageRequest, n: int, spec: CheckpointSpec) -> ImageRequest:
    """Make a request of another prompt, seed, number of steps, sampler and guidance."""
    strange = replace(
        request,
        id=f"stranger {n}",
        prompt="blue " * n,
        seed=n,
        num_steps=STEPS + n,
        sampler=spec.samplers[n % 2],
    )
    if spec.family == "drawn_flux":
        return replace(strange, guidance=1.0 + n, options={"true_cfg_scale": 1.0 + n % 2})
    return replace(strange, guidance=1.0 + n % 3)


def _latents_and_pixels(
    stepper: Stepper, request: ImageRequest, among: Callable[[InFlight], Sequence[InFlight]]
) -> list[Tensor]:
    """Return what the image has after every step, then its pixels; all on the host."""
    image = stepper.started(request)
    seen = []
    while not image.is_denoised:
        stepper.step(image, bucket_rows=BUCKET_ROWS, among=among(image))
        seen.append(image.tensors.latents.cpu())
    return [*seen, torch.from_numpy(stepper.runner.decode(image).pixels())]


def apart_after_resume(spec: CheckpointSpec, device: str, kernel: str) -> float:
    """Return the largest difference between an image and the same taken over by a second engine.

    The second engine has others, too. Of its state and its pixels.
    """
    config = EngineConfig(
        device=device, max_batch_rows=BUCKET_ROWS, row_buckets=(BUCKET_ROWS,), attention=kernel
    )
    request = a_request(spec, num_steps=STEPS, sampler=spec.samplers[-1], seed=7)
    request = replace(request, determinism=Determinism.REPRODUCIBLE, bucket_rows=BUCKET_ROWS)
    forget()  # each engine draws its own
    with Engine(config, [spec]) as engine:
        blobs, on_event = _snapshots_of(engine, request)
        whole = [torch.from_numpy(engine.submit(request, on_event).result(PATIENCE_S).pixels)]
    whole += _state(blobs[LOOKED_AT_AFTER])
    forget()
    tidy()
    saved = blobs[SAVED_AFTER].result(PATIENCE_S)
    with Engine(config, [spec]) as engine:
        neighbours = [
            engine.submit(a_request(spec, f"neighbour {n}", num_steps=STEPS + n, seed=n))
            for n in range(2)
        ]
        blobs, on_event = _snapshots_of(engine, request)
        resumed = [torch.from_numpy(engine.restore(saved, on_event).result(PATIENCE_S).pixels)]
        for neighbour in neighbours:
            neighbour.result(PATIENCE_S)
    resumed += _state(blobs[LOOKED_AT_AFTER])
    return apart(whole, resumed)


def _snapshots_of(
    engine: Engine, request: ImageRequest
) -> tuple[dict[int, Future[bytes]], Callable[[EngineEvent], None]]:
    """Return snapshots by step, and the listener that asks for them.

    They are there once the image has ended.
    """
    blobs: dict[int, Future[bytes]] = {}

    def on_event(event: EngineEvent) -> None:
        if isinstance(event, Stepped) and event.step in (SAVED_AFTER, LOOKED_AT_AFTER):
            blobs[event.step] = engine.snapshot(request.id)

    return blobs, on_event


def _state(blob: Future[bytes]) -> list[Tensor]:
    return [tensor for _, tensor in sorted(from_bytes(blob.result(PATIENCE_S)).tensors.items())]


def apart(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """Return the largest difference of any two.

    0 only where all are equal to the bit, the largest float where something is not a number.
    """
    differences = [0.0]
    for one, other in zip(ones, others, strict=True):
        if not torch.equal(one, other):
            difference = float((one.double() - other.double()).abs().max())
            differences.append(difference if difference > 0 else sys.float_info.max)
    return max(differences)
