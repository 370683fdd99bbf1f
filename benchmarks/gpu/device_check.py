"""The first seconds on a device: does what the rest builds on work at all?

Every attention kernel once, the speed of plain matrix products, and whether a line compiles. It
judges nothing.
"""

import shutil
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.cells import Cells, Found, Setting
from engine.acceleration import COMPILERS

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "math": SDPBackend.MATH,
}
HEADS = {
    "64 wide": (2, 10, 4096, 64),
    "128 wide": (1, 24, 4608, 128),
    "512 wide": (1, 1, 4096, 512),
}
REPEATS = 5
SIDE = 8192  # of square matrices


def check(setting: Setting, cells: Cells) -> None:
    """Take the cells of the first seconds."""
    cells.take("attention", lambda: _attention(setting))
    cells.take("matmul", lambda: _matmul(setting))
    cells.take("compiler", lambda: _compiler(setting))


def _attention(setting: Setting) -> Found:
    """Time each kernel over heads as wide as SDXL's, FLUX's and the VAE's; or say why it refuses.

    In bf16.
    """
    found: Found = {}
    for heads, (rows, count, length, width) in HEADS.items():
        length = 64 if setting.tiny else length
        given = torch.randn(rows, count, length, width, device=setting.device, dtype=torch.bfloat16)
        for name, backend in KERNELS.items():
            try:
                found[f"{name}, {heads}"] = _seconds(partial(_attend, given, backend), setting)
            except torch.AcceleratorError:
                raise  # no refusal: the device failed
            except RuntimeError as problem:
                found[f"{name}, {heads}"] = f"refused: {problem}"[:100]
    return found


def _attend(given: Tensor, backend: SDPBackend) -> Tensor:
    with sdpa_kernel(backend):
        attended: Tensor = scaled_dot_product_attention(given, given, given)
    return attended


def _matmul(setting: Setting) -> Found:
    """Time a product of large matrices in bf16: what the device reaches at best.

    Of random numbers and of zeros, with which a GPU keeps a higher clock.
    """
    side = 256 if setting.tiny else SIDE
    found: Found = {}
    for name, draw in (("random", torch.randn), ("zeros", torch.zeros)):
        matrix = draw(side, side, device=setting.device, dtype=torch.bfloat16)
        seconds = _seconds(partial(torch.matmul, matrix, matrix), setting)
        found[f"{name}_tflops"] = 2 * side**3 / seconds / 1e12
    return found


def _compiler(setting: Setting) -> Found:
    """Compile a line, and say what with."""
    kind = "cuda" if setting.is_cuda else "cpu"
    found: Found = {name: shutil.which(name) for name in COMPILERS[kind]}
    started = time.perf_counter()
    line: Any = torch.compile(_line)
    line(torch.ones(64, device=setting.device))
    return found | {"first_call_s": time.perf_counter() - started}


def _line(numbers: Tensor) -> Tensor:
    return numbers * 2 + 1


def _seconds(work: Callable[[], object], setting: Setting) -> float:
    """Return the mean seconds of some calls, the first two not among them."""

    def wait() -> None:
        if setting.is_cuda:
            torch.cuda.synchronize()

    for _ in range(2):
        work()
    wait()
    started = time.perf_counter()
    for _ in range(REPEATS):
        work()
    wait()
    return (time.perf_counter() - started) / REPEATS
