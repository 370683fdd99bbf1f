"""Is an image the same with other neighbours, elsewhere in its bucket, and taken over by another engine? To the bit, by dtype and kernel.

What an image is compared by are the latents of every step, the state that is saved, and the decoded pixels. It judges nothing.
"""

import random
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from benchmarks.networks import a_request, lay_out
from benchmarks.networks.cells import Cells, Found, Setting, tidy
from benchmarks.networks.drawn import forget
from benchmarks.networks.workbench import Workbench
from engine.config import CheckpointSpec, EngineConfig
from engine.engine import Engine
from engine.events import EngineEvent, Stepped
from engine.inflight import InFlight
from engine.request import Determinism, ImageRequest
from engine.snapshots import from_bytes

FAMILIES = ("sd", "sdxl", "sd3", "flux")
PRECISIONS = ("bf16", "fp16", "fp32")
KERNELS = ("auto", "flash", "efficient", "cudnn", "math")
BUCKET_ROWS = 8
STEPS, SAVED_AFTER, LOOKED_AT_AFTER = 6, 3, 5
PATIENCE_S = 600  # for one image


def invariance(setting: Setting, cells: Cells) -> None:
    """A cell for every family, precision and attention kernel; then for what makes a checkpoint faster."""

    def take(family: str, precision: str, kernel: str, needs_s: float, **changes: bool) -> None:
        name = " ".join([family, precision, kernel, *changes])
        cells.take(name, lambda: _bits(family, precision, kernel, setting, **changes), needs_s=needs_s)

    for kernel in KERNELS[:2] if setting.quick or setting.tiny else KERNELS:  # the kernels last: all else is asked of every family first
        for precision in PRECISIONS:
            for family in FAMILIES:
                take(family, precision, kernel, 4)
    for family in ("sd", "sdxl"):
        take(family, "bf16", "auto", 4, channels_last=True)
    if setting.is_cuda:
        for family in FAMILIES:
            take(family, "bf16", "auto", 4, cuda_graphs=True)
        for family in ("sdxl", "flux"):
            take(family, "bf16", "auto", 60, compile_blocks=True)


def _bits(family: str, precision: str, kernel: str, setting: Setting, **changes: bool) -> Found:
    forget()
    spec = lay_out(setting.folder, family, "tiny" if setting.tiny else "small", precision=precision, **changes)
    bench = Workbench(spec, setting.device, attention=kernel)
    found: Found = {"kernel": _kernel_for_heads(bench), "apart_in_company": apart_in_company(bench, spec)}
    del bench
    found["apart_after_resume"] = apart_after_resume(spec, setting.device, kernel)
    forget()
    return found | {"invariant": found["apart_in_company"] == 0, "resumed": found["apart_after_resume"] == 0}


def _kernel_for_heads(bench: Workbench) -> str:
    """The attention kernel that runs for heads of 64 as the engine has set it up: the plain one where the pinned one cannot."""
    heads = torch.randn(2, 4, 256, 64, device=bench.device.torch_device, dtype=bench.loaded.family.dtype)
    return str(SDPBackend(torch._fused_sdp_choice(heads, heads, heads)).name).lower()


def apart_in_company(bench: Workbench, spec: CheckpointSpec) -> float:
    """The largest difference between an image alone in its bucket and the same beside others, in row 0 and elsewhere. 0: not a bit.

    At every step other strangers are there, each at a step of its own, some guided, some not. Raises `AssertionError` when another
    seed gives the same latents, for nothing is shown then.
    """
    wish = a_request(spec, num_steps=STEPS, guidance=4.0, sampler=spec.samplers[-1], seed=7)
    strangers = [bench.started(_a_strange(wish, n, spec)) for n in range(5)]
    for n, stranger in enumerate(strangers):
        for _ in range(n):
            bench.step(stranger, bucket_rows=BUCKET_ROWS)
    dice = random.Random(0)

    def behind(image: InFlight) -> list[InFlight]:
        """The image in the first rows, then as many strangers as there is room for."""
        images = [image]
        for stranger in dice.sample(strangers, dice.randint(1, len(strangers))):
            if sum(other.rows for other in images) + stranger.rows <= BUCKET_ROWS:
                images.append(stranger)
        return images

    def amidst(image: InFlight) -> list[InFlight]:
        images = behind(image)
        dice.shuffle(images)
        return images

    alone = _latents_and_pixels(bench, wish, lambda image: [image])
    other = _latents_and_pixels(bench, replace(wish, seed=8), lambda image: [image])
    assert not torch.equal(alone[0], other[0]), "another seed gives the same latents"
    return max(apart(alone, _latents_and_pixels(bench, wish, among)) for among in (behind, amidst, behind))


def _a_strange(wish: ImageRequest, n: int, spec: CheckpointSpec) -> ImageRequest:
    """Another prompt, seed, number of steps, sampler and guidance."""
    strange = replace(wish, id=f"stranger {n}", prompt="blue " * n, seed=n, num_steps=STEPS + n, sampler=spec.samplers[n % 2])
    if spec.family == "drawn_flux":
        return replace(strange, guidance=1.0 + n, options={"true_cfg_scale": 1.0 + n % 2})
    return replace(strange, guidance=1.0 + n % 3)


def _latents_and_pixels(bench: Workbench, wish: ImageRequest, among: Callable[[InFlight], Sequence[InFlight]]) -> list[Tensor]:
    """What the image has after every step, then its pixels; all on the host."""
    image = bench.started(wish)
    seen = []
    while not image.is_denoised:
        bench.step(image, bucket_rows=BUCKET_ROWS, among=among(image))
        seen.append(image.tensors.latents.cpu())
    return [*seen, torch.from_numpy(bench.runner.decode(image).pixels())]


def apart_after_resume(spec: CheckpointSpec, device: str, kernel: str) -> float:
    """The largest difference between an image and the same taken over by a second engine, which has others too: its state, its pixels."""
    config = EngineConfig(device=device, max_batch_rows=BUCKET_ROWS, row_buckets=(BUCKET_ROWS,), attention=kernel)
    wish = a_request(spec, num_steps=STEPS, sampler=spec.samplers[-1], seed=7)
    wish = replace(wish, determinism=Determinism.REPRODUCIBLE, bucket_rows=BUCKET_ROWS)
    forget()  # each engine draws its own
    with Engine(config, [spec]) as engine:
        blobs, on_event = _snapshots_of(engine, wish)
        whole = [torch.from_numpy(engine.submit(wish, on_event).result(PATIENCE_S).pixels)]
    whole += _state(blobs[LOOKED_AT_AFTER])
    forget()
    tidy()
    saved = blobs[SAVED_AFTER].result(PATIENCE_S)
    with Engine(config, [spec]) as engine:
        neighbours = [engine.submit(a_request(spec, f"neighbour {n}", num_steps=STEPS + n, seed=n)) for n in range(2)]
        blobs, on_event = _snapshots_of(engine, wish)
        resumed = [torch.from_numpy(engine.restore(saved, on_event).result(PATIENCE_S).pixels)]
        for neighbour in neighbours:
            neighbour.result(PATIENCE_S)
    resumed += _state(blobs[LOOKED_AT_AFTER])
    return apart(whole, resumed)


def _snapshots_of(engine: Engine, wish: ImageRequest) -> tuple[dict[int, Future[bytes]], Callable[[EngineEvent], None]]:
    """Snapshots by step, there once the image has ended, and the listener that asks for them."""
    blobs: dict[int, Future[bytes]] = {}

    def on_event(event: EngineEvent) -> None:
        if isinstance(event, Stepped) and event.step in (SAVED_AFTER, LOOKED_AT_AFTER):
            blobs[event.step] = engine.snapshot(wish.id)

    return blobs, on_event


def _state(blob: Future[bytes]) -> list[Tensor]:
    return [tensor for _, tensor in sorted(from_bytes(blob.result(PATIENCE_S)).tensors.items())]


def apart(ones: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference of any two: 0 only where all are equal to the bit, the largest float where something is not a number."""
    differences = [0.0]
    for one, other in zip(ones, others, strict=True):
        if not torch.equal(one, other):
            difference = float((one.double() - other.double()).abs().max())
            differences.append(difference if difference > 0 else sys.float_info.max)
    return max(differences)
