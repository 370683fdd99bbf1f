"""Is an image of a network of full size the same wherever its rows lie, beside zeros, and resumed?

Small networks take other kernels. Compared to the bit are predictions, latents and pixels. It
judges nothing.
"""

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.cells import Cells, Found, Setting
from benchmarks.gpu.checkpoints import a_request, write_checkpoint
from benchmarks.gpu.invariance import apart, kernel_for_heads
from benchmarks.gpu.models import MODELS
from benchmarks.gpu.plan import PARTS, changes_of
from benchmarks.gpu.random_networks import forget
from benchmarks.gpu.stepper import Stepper
from engine.inflight import InFlight
from engine.request import ImageRequest
from engine.scheduler import Batch

IMAGES = 4
STEPS = 4
SAVED_AFTER = 1  # steps


def full_bits(part: str, setting: Setting, cells: Cells) -> None:
    """Take the cells of a part: "sdxl bf16 bucket 8 cuda_graphs"."""
    for name in PARTS[part].cells:
        cells.take(name, partial(_bits, name, setting))


def _bits(name: str, setting: Setting) -> Found:
    family, precision, _, rows, *words = name.split()
    if "cuda_graphs" in words:
        setting.check_cuda("CUDA graphs")
    if words:
        forget()
    spec = write_checkpoint(
        setting.folder, family, setting.scale, precision=precision, **changes_of(words)
    )
    stepper = Stepper(spec, setting.device)
    guidance = MODELS[family].guidance
    request = a_request(spec, num_steps=STEPS, guidance=guidance, sampler=spec.samplers[-1])
    images = [stepper.started(replace(request, id=str(seed), seed=seed)) for seed in range(IMAGES)]
    found = beside_others(stepper, images, int(rows))
    found["apart_after_resume"] = _after_resume(stepper, request, images[1:], int(rows))
    if words:
        forget()
    in_company = max(found["apart_permuted"], found["apart_beside_zeros"])
    return found | {
        "kernel": kernel_for_heads(stepper),
        "apart_in_company": in_company,
        "invariant": in_company == 0,
        "resumed": found["apart_after_resume"] == 0,
    }


def beside_others(stepper: Stepper, images: list[InFlight], rows: int) -> Found:
    """Compare the predictions of a full forward with those of others that hold the same rows."""
    together = _predictions(stepper, images, rows)
    reversed_rows = _predictions(stepper, images[::-1], rows)[::-1]
    alone = [_predictions(stepper, [image], rows)[0] for image in images]
    assert not torch.equal(together[0], together[1]), "two seeds give the same prediction"
    return {
        "rows": rows,
        "apart_permuted": apart(together, reversed_rows),
        "apart_beside_zeros": apart(together, alone),
    }


def _after_resume(
    stepper: Stepper, request: ImageRequest, others: list[InFlight], rows: int
) -> float:
    """Compare an image denoised among zeros with one restored among others.

    By its latents after each step, and its pixels.
    """
    image = stepper.started(request)
    whole: list[Tensor] = []
    for step in range(STEPS):
        if step == SAVED_AFTER:
            state = stepper.runner.save(image)
        stepper.step(image, bucket_rows=rows)
        if step >= SAVED_AFTER:
            whole.append(image.tensors.latents.cpu())
    whole.append(_pixels(stepper, image))

    restored = stepper.restored(replace(request, id="restored"), state, SAVED_AFTER)
    resumed: list[Tensor] = []
    while not restored.is_denoised:
        stepper.step(restored, bucket_rows=rows, among=[*others, restored])
        resumed.append(restored.tensors.latents.cpu())
    resumed.append(_pixels(stepper, restored))
    return apart(whole, resumed)


def _predictions(stepper: Stepper, images: list[InFlight], rows: int) -> list[Tensor]:
    """Return each image's prediction, on the host."""
    predicted = stepper.runner.predict(Batch(tuple(images), rows))
    return [each.cpu() for each in predicted]


def _pixels(stepper: Stepper, image: InFlight) -> Tensor:
    return torch.from_numpy(stepper.runner.decode(image).pixels())
