"""On a GPU: the same bits in company, after a resume, from recorded forwards and beside another
stream; flat memory, and too little of it.

Networks are small, with random weights, and take the kernels of large ones. Everything is compared
to the bit. Run it alone where nothing but the engine's own requirements is installed:
`python -m pytest -m gpu tests/engine/test_gpu.py --noconftest`. docs/figures.md names those
to run first, in 80 seconds.
"""

import contextlib
import gc
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.gpu.checkpoints import a_request, write_checkpoint
from benchmarks.gpu.invariance import BUCKET_ROWS, apart_after_resume, apart_in_company
from benchmarks.gpu.plan import FAMILIES, KERNELS, PRECISIONS
from benchmarks.gpu.random_networks import forget
from benchmarks.gpu.stepper import Stepper
from engine.config import EngineConfig
from engine.engine import Engine
from engine.errors import ImageCanceled
from engine.request import Determinism
from engine.scheduler import Batch

DEVICE = "cuda:0"
# A growth ceiling under which every row joins. Not imported: what else builds engines for tests
# needs more than is installed beside a lone engine.
ALWAYS = 1e9

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

every_precision_and_kernel = pytest.mark.parametrize(
    ("family", "precision", "kernel"),
    [(family, precision, "auto") for family in FAMILIES for precision in PRECISIONS]
    + [(family, "bf16", kernel) for family in FAMILIES for kernel in KERNELS[1:]]
    + [("sdxl", "fp32", "efficient"), ("flux", "fp16", "flash")],
)


@pytest.fixture(autouse=True)
def networks_of_its_own():
    """What a test changed in place is nobody's after it."""
    forget()
    yield
    forget()
    gc.collect()
    torch.cuda.empty_cache()


def an_engine(*specs, **changes) -> Engine:
    return Engine(
        EngineConfig(**{"device": DEVICE, "max_batch_rows": BUCKET_ROWS} | changes), specs
    )


def rendered(engine, requests) -> list:
    return [handle.result(300) for handle in [engine.submit(request) for request in requests]]


def as_pixels(decoded) -> np.ndarray:
    unit = (decoded * 0.5 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu().numpy()[0]
    return (unit * 255).round().astype(np.uint8)


# --- bits ---


@every_precision_and_kernel
def test_an_image_is_the_same_alone_and_in_company_wherever_its_rows_lie(
    tmp_path, family, precision, kernel
):
    spec = write_checkpoint(tmp_path, family, "small", precision=precision)

    assert apart_in_company(Stepper(spec, DEVICE, attention=kernel), spec) == 0


@every_precision_and_kernel
def test_a_second_engine_goes_on_from_a_snapshot_with_the_same_bits(
    tmp_path, family, precision, kernel
):
    spec = write_checkpoint(tmp_path, family, "small", precision=precision)

    assert apart_after_resume(spec, DEVICE, kernel) == 0


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_another_layout_of_the_weights_keeps_both_promises(tmp_path, family):
    spec = write_checkpoint(tmp_path, family, "small", channels_last=True)

    assert apart_in_company(Stepper(spec, DEVICE), spec) == 0
    assert apart_after_resume(spec, DEVICE, "auto") == 0


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_recorded_forward_gives_the_bits_of_a_plain_one(tmp_path, family, precision):
    spec = write_checkpoint(tmp_path, family, "small", precision=precision)
    plain, recorded = Stepper(spec, DEVICE), Stepper(replace(spec, cuda_graphs=True), DEVICE)
    images = [plain.started(a_request(spec, str(n), seed=n, guidance=1.0)) for n in range(4)]

    for seeds, bucket_rows in [
        ([0], 1),
        ([1, 2], 4),
        ([0, 1, 2, 3], 4),
        ([3], 1),
        ([2, 0], 2),
        ([1, 2], 4),
    ]:
        batch = Batch(tuple(images[seed] for seed in seeds), bucket_rows)
        for expected, found in zip(
            plain.runner.predict(batch), recorded.runner.predict(batch), strict=True
        ):
            assert torch.equal(expected, found)


@pytest.mark.parametrize("family", ["sdxl", "flux"])
def test_recorded_forwards_keep_both_promises(tmp_path, family):
    spec = write_checkpoint(tmp_path, family, "small", cuda_graphs=True)

    assert apart_in_company(Stepper(spec, DEVICE), spec) == 0
    assert apart_after_resume(spec, DEVICE, "auto") == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_a_decode_beside_forwards_gives_the_pixels_of_one_on_the_main_stream(tmp_path, family):
    spec = write_checkpoint(tmp_path, family, "small")
    stepper = Stepper(spec, DEVICE)
    pictures = [stepper.started(a_request(spec, str(seed), seed=seed)) for seed in range(3)]
    busy = stepper.started(a_request(spec, "busy", seed=9))
    with torch.inference_mode():
        expected = [as_pixels(stepper.loaded.family.decode(image)) for image in pictures]

    for _ in range(3):
        developing = []
        for image in pictures:
            developing.append(stepper.runner.decode(image))
            for _ in range(5):
                stepper.runner.predict(Batch((busy,), BUCKET_ROWS))
        for each, pixels in zip(developing, expected, strict=True):
            assert np.array_equal(each.pixels(), pixels)


def test_reproducible_images_keep_their_bits_while_strangers_come_go_and_are_decoded(tmp_path):
    specs = [write_checkpoint(tmp_path, family, "small") for family in ("sdxl", "flux")]
    wishes = [
        replace(
            a_request(
                spec,
                f"{spec.name} {seed}",
                num_steps=6 + seed,
                sampler=spec.samplers[-1],
                seed=seed,
            ),
            determinism=Determinism.REPRODUCIBLE,
            bucket_rows=BUCKET_ROWS,
        )
        for spec in specs
        for seed in range(4)
    ]
    strangers = [
        a_request(spec, f"{spec.name} stranger {n}", num_steps=2 + n, seed=50 + n)
        for spec in specs
        for n in range(8)
    ]
    with an_engine(*specs, max_inflight=6) as engine:
        alone = {wish.id: engine.submit(wish).result(300).pixels for wish in wishes}

        crowd = [*wishes, *strangers]
        random.Random(0).shuffle(crowd)
        handles = [engine.submit(request) for request in crowd]
        for handle in handles:
            if handle.request.num_steps % 5 == 4 and handle.request in strangers:
                handle.cancel()

        for handle in handles:
            if handle.request.id in alone:
                assert np.array_equal(handle.result(300).pixels, alone[handle.request.id])
            else:
                finished_or_canceled(handle)


def finished_or_canceled(handle) -> None:
    with contextlib.suppress(ImageCanceled):
        handle.result(300)


# --- memory ---


def test_memory_is_flat_over_two_hundred_images(tmp_path):
    specs = [
        write_checkpoint(tmp_path, "sdxl", "tiny", sizes=((64, 64), (128, 64))),
        write_checkpoint(tmp_path, "flux", "tiny", cuda_graphs=True),
    ]
    allocated, reserved = [], []
    with an_engine(*specs, row_buckets=(1, 2, 4, 8)) as engine:
        for wave in range(10):
            handles = []
            for n in range(20):
                spec = specs[n % 2]
                width_px, height_px = spec.sizes[n % len(spec.sizes)]
                changes = {
                    "width_px": width_px,
                    "height_px": height_px,
                    "num_steps": 2 + n % 5,
                    "guidance": 1.0 + n % 3,
                    "seed": n,
                }
                handles.append(engine.submit(a_request(spec, f"{wave} {n}", **changes)))
            handles[wave].cancel()
            for handle in handles:
                finished_or_canceled(handle)
            gc.collect()
            torch.cuda.synchronize()
            allocated.append(torch.cuda.memory_allocated())
            reserved.append(torch.cuda.memory_reserved())

    assert max(allocated[2:]) <= allocated[1]
    assert max(reserved[2:]) <= max(reserved[:2]) + 64 * 2**20


def test_recorded_forwards_keep_memory_from_rows_until_their_checkpoint_goes(tmp_path):
    spec = write_checkpoint(tmp_path, "flux", "tiny", cuda_graphs=True)
    with an_engine(spec, row_buckets=(1, 2, 4, 8)) as engine:
        loop = engine._loop
        kept = loop._device.recorded_bytes()
        room = loop._memory_bytes - engine.weights_bytes(spec.name)
        budget = engine._scheduler.memory_budget_bytes
        engine.unload(spec.name).result(60)
        left = loop._device.recorded_bytes()

    assert kept > 0
    assert budget == room - kept
    assert left == 0


def test_a_picture_s_encode_is_measured(tmp_path):
    spec = write_checkpoint(tmp_path, "sdxl", "tiny")
    with an_engine(spec) as engine:
        found = [one.footprint for one in engine.costs.measurements() if one.footprint]

    assert found
    assert all(footprint.encode_bytes > 0 for footprint in found)


def test_sdxl_decoded_with_tf32_looks_the_same(tmp_path):
    spec = write_checkpoint(tmp_path, "sdxl", "small", precision="fp16")
    pixels = {}
    for vae_tf32 in (True, False):
        stepper = Stepper(replace(spec, vae_tf32=vae_tf32), DEVICE)
        image = stepper.started(a_request(spec, "a"))
        pixels[vae_tf32] = stepper.runner.decode(image).pixels().astype(int)

    assert np.abs(pixels[True] - pixels[False]).mean() < 1


def test_a_forward_that_does_not_fit_lowers_the_cap_and_every_image_is_rendered(tmp_path):
    spec = write_checkpoint(tmp_path, "sd", "small", sizes=((512, 512),))
    stepper = Stepper(spec, DEVICE)
    images = [stepper.started(a_request(spec, str(n), seed=n)) for n in range(16)]
    with an_engine(spec, max_batch_rows=32, growth_ceiling=ALWAYS) as engine:

        def bytes_of(work) -> int:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            held_bytes = torch.cuda.memory_allocated()
            work()
            stepper.wait()
            return torch.cuda.max_memory_allocated() - held_bytes

        all_rows = bytes_of(lambda: stepper.runner.predict(Batch(tuple(images), 32)))
        half_of_them = bytes_of(lambda: stepper.runner.predict(Batch(tuple(images[:8]), 16)))
        fits = half_of_them + bytes_of(lambda: stepper.runner.decode(images[0]))
        assert fits < all_rows
        wishes = [a_request(spec, f"{n}", num_steps=20, seed=n) for n in range(16)]
        unlimited = rendered(engine, wishes)
        torch.cuda.empty_cache()
        limit = torch.cuda.memory_reserved() + (fits + all_rows) // 2
        torch.cuda.set_per_process_memory_fraction(
            limit / torch.cuda.get_device_properties(DEVICE).total_memory
        )
        try:
            first, second = rendered(engine, wishes), rendered(engine, wishes)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)

    assert max(image.record.max_rows for image in unlimited) == 32
    assert len(first) == 16
    assert max(image.record.max_rows for image in second) <= 16
