"""What the engine gives on a GPU: large networks beside plain diffusers, curves by rows, and bits.

    python -m benchmarks.gpu [--quick] [--only sdxl|flux|invariance|curves] [--minutes 9]
                             [--results FOLDER] [--device cuda:0]
    python -m benchmarks.gpu --tiny [--device cpu]   # tiny networks, anywhere: shows that it runs

Networks have SDXL's and FLUX.1's size. Weights are random (random_networks.py): nothing is
downloaded, and what weights say changes cost by no more than a clock does. Each part has a process
of its own, which says what it found cell by cell; a cell that fails, or for which the minutes do
not suffice, is named and harms no other. What was found is written to the results folder after
every part. Without a GPU it says so and ends.

sdxl, flux  1024 px in bf16; 20 steps with classifier-free guidance, 28 steps with a distilled one.
            Plain `pipe()` under torch's own settings, before and after the engine, which renders
            image by image ("alone") and then many at once ("busy": as many rows in a forward as its
            measured curve says). Then the engine with CUDA graphs, channels_last and compiled
            blocks, the pipeline with compiled blocks, and decodes beside forwards. Both sides start
            from encoded prompts and end with pixels on the host.
invariance  Small networks of every family, fp32, bf16 and fp16, every attention kernel: is an image
            the same with other neighbours and elsewhere in its bucket, and after a snapshot is
            taken over by a second engine? Latents, state and pixels, to the bit.
curves      Seconds and bytes of a forward of both networks by rows and size, and the knee: the rows
            at which more do not pay.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import machine
from benchmarks.gpu.parts import REPO, SHARES, Part, run_part
from benchmarks.gpu.report import TARGETS, figures_of, table_of, write_results
from benchmarks.lib.tables import WIDTH, show
from benchmarks.lib.verdict import exit_status, judge, rounded, said

YARDSTICKS = (
    "MLPerf Inference, SDXL on one H200: 2.4 images/s (20 steps, FP8, TensorRT)",
    "FLUX.1-dev on one H100, 28 steps: 6.7 s eager, 4.5 s compiled",
)


def main() -> int:
    """Run the parts, print their tables and one line of JSON.

    1 if a target is missed or a cell failed.
    """
    options = _options()
    options.device = options.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if not options.device.startswith("cuda") and not options.tiny:
        print("benchmarks.gpu needs a GPU; --tiny shows that it runs")
        print(json.dumps({"benchmark": "gpu", "skipped": "no CUDA device"}))
        return 0
    folder = options.results or (None if options.tiny else REPO / "benchmarks" / "results")
    about = {
        "benchmark": "gpu",
        "quick": options.quick,
        "tiny": options.tiny,
        "machine": machine(options.device),
    }
    parts = _run_parts(options, folder, about)
    _show(parts)
    last = about | _verdict(parts, tiny=options.tiny)
    if folder is not None:
        file = write_results(folder, last | _as_json(parts), options.only)
        print(f"written to {file}")
    print(json.dumps(last))
    return 1 if last["failed"] else exit_status(last["met"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer images, kernels and rows")
    add(
        "--tiny",
        action="store_true",
        help="tiny networks, on any device: shows that it runs",
    )
    add("--only", choices=list(SHARES), help="one part")
    add(
        "--minutes",
        type=float,
        default=9.0,
        help="begin nothing that would not end within these",
    )
    add("--device", help="cuda:0 where there is one; cpu is for --tiny")
    add(
        "--results",
        type=Path,
        help="folder to write to; unless --tiny, benchmarks/results",
    )
    return parser.parse_args()


def _run_parts(
    options: argparse.Namespace, folder: Path | None, about: Mapping[str, Any]
) -> dict[str, Part]:
    """Run one part after the other; write what was found after each."""
    end = time.monotonic() + 60 * options.minutes
    names = [options.only] if options.only else list(SHARES)
    parts: dict[str, Part] = {}
    for place, name in enumerate(names):
        share = SHARES[name] / sum(SHARES[later] for later in names[place:])
        seconds = share * max(end - time.monotonic(), 0.0)
        parts[name] = run_part(
            name, seconds, device=options.device, quick=options.quick, tiny=options.tiny
        )
        if folder is not None:
            write_results(folder, {**about, **_as_json(parts)}, options.only)
    return parts


def _verdict(parts: Mapping[str, Part], *, tiny: bool) -> dict[str, Any]:
    figures = rounded(figures_of(parts))
    targets = [target for target in TARGETS if target.figure in figures]
    # Tiny networks show nothing of speed.
    not_judged = [target.figure for target in targets if tiny and "_to_plain" in target.figure]
    return {
        "figures": figures,
        "targets": said(targets),
        "met": judge(figures, targets, not_judged),
        "failed": [f"{name}, {cell}" for name, part in parts.items() for cell in part.failed],
        "left_out": [f"{name}, {cell}" for name, part in parts.items() for cell in part.left_out],
    }


def _as_json(parts: Mapping[str, Part]) -> dict[str, Any]:
    return {"parts": {name: asdict(part) for name, part in parts.items()}}


def _show(parts: Mapping[str, Part]) -> None:
    show(*(table_of(name, part) for name, part in parts.items()), width=WIDTH)
    print(*YARDSTICKS, sep="\n")
    for name, part in parts.items():
        if part.left_out:
            print(f"left out of {name} for want of time: {', '.join(part.left_out)}")
        for cell, why in part.failed.items():
            print(f"failed: {name}, {cell}: {why}")


if __name__ == "__main__":
    sys.exit(main())
