"""The process of one part: takes its cells one after the other, and prints a line for each.

    python -m benchmarks.gpu.part_process PART UNTIL DEVICE --traces FOLDER [--quick] [--tiny]

UNTIL: an instant of `time.time()`.
"""

import argparse
import os
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from benchmarks.gpu.cells import DEVICE_LOST, Cells, Setting
from benchmarks.gpu.curves import curves
from benchmarks.gpu.device_check import check
from benchmarks.gpu.full_bits import full_bits
from benchmarks.gpu.invariance import invariance
from benchmarks.gpu.plan import PARTS, QUICK_SHARE
from benchmarks.gpu.profiles import profiles
from benchmarks.gpu.speed import speed
from engine.device import Device

TAKEN: Mapping[str, Callable[[Setting, Cells], None]] = {
    "check": check,
    "full_bits": partial(full_bits, "full_bits"),
    "full_bits_variants": partial(full_bits, "full_bits_variants"),
    "profile": profiles,
    "invariance": invariance,
    "curves": curves,
}
"""All others measure the speed of a model."""


def main() -> None:
    """Take the cells of a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(PARTS))
    parser.add_argument("until", type=float)
    parser.add_argument("device")
    parser.add_argument("--traces", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)
    device = Device(options.device, num_threads=1)
    share = QUICK_SHARE if options.quick else 1.0
    planned = {} if options.tiny else PARTS[options.part].cells
    needs_s = {name: share * seconds for name, seconds in planned.items()}
    cells = Cells(options.until, needs_s, device.is_lost)
    with tempfile.TemporaryDirectory(prefix="darkroom-gpu-") as folder:
        setting = Setting(options.device, options.quick, options.tiny, Path(folder), options.traces)
        TAKEN.get(options.part, partial(speed, options.part))(setting, cells)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if end.code == DEVICE_LOST:
            os._exit(DEVICE_LOST)  # to take CUDA down on such a device would abort
        raise
