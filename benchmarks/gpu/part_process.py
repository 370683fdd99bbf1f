"""The process of one part: takes its cells one after the other, and prints a line for each.

    python -m benchmarks.gpu.part_process PART UNTIL DEVICE [--quick] [--tiny]

UNTIL: an instant of `time.time()`.
"""

import argparse
import tempfile
from pathlib import Path

import torch

from benchmarks.gpu.cells import Cells, Setting
from benchmarks.gpu.curves import curves
from benchmarks.gpu.invariance import invariance
from benchmarks.gpu.parts import SHARES
from benchmarks.gpu.speed import speed


def main() -> None:
    """Take the cells of a part."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", choices=list(SHARES))
    parser.add_argument("until", type=float)
    parser.add_argument("device")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(options.device)
    cells = Cells(options.until)
    with tempfile.TemporaryDirectory(prefix="darkroom-gpu-") as folder:
        setting = Setting(options.device, options.quick, options.tiny, Path(folder))
        if options.part == "invariance":
            invariance(setting, cells)
        elif options.part == "curves":
            curves(setting, cells)
        else:
            speed(options.part, setting, cells)


if __name__ == "__main__":
    main()
