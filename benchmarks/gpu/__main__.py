"""What the engine gives on a GPU: bits at full size, speed beside plain diffusers, and profiles.

    python -m benchmarks.gpu --round 1         # nine minutes: run 1, then 2, then 3
    python -m benchmarks.gpu --only sdxl flux  # some parts, as long as they take
    python -m benchmarks.gpu --quick           # a minute: SDXL beside plain diffusers
    python -m benchmarks.gpu --tiny            # tiny networks, anywhere: shows that it runs

Networks have SDXL's and FLUX.1's size. Weights are random (random_networks.py): nothing is
downloaded, and what weights say changes cost by no more than a clock does. Each part has a process
of its own, which says what it found cell by cell. A cell that fails, or for which the minutes do
not suffice, is named and harms no other; a lost device ends its part, and the others go on. What
was found is written to the results folder after every part. Without a GPU it says so and ends.

Round 1
check       Every attention kernel, matrix products, a compiler.
full_bits   Networks of full size: is an image the same wherever its rows lie, beside zeros, and
            resumed among others? To the bit.
sdxl, flux  1024 px in bf16; 20 steps with classifier-free guidance, 28 steps with a distilled one.
            Plain `pipe()` under torch's own settings, before and after the engine, which renders
            image by image ("alone") and then many at once ("busy"), beside a plain call of as many
            rows. What of a forward is launch and what the device's; decodes beside forwards; CUDA
            graphs; channels_last. Both sides start from encoded prompts and end with pixels on the
            host.
profile     A denoise step by kind of kernel, with a trace.

Round 2     *_compiled: blocks compiled, theirs and ours.  *_quantised: float8 and int8.

Round 3
full_bits_variants  The same of graphs, layouts, 8-bit weights and compiled blocks.
invariance  Small networks of every family and precision, then with what makes them faster, then
            with every attention kernel; resumed by a second engine.
curves      Seconds and bytes of a forward by rows and size, and the knee: the rows at which more do
            not pay.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.machine import machine
from benchmarks.gpu.parts import REPO, Part, run_part
from benchmarks.gpu.plan import (
    PARTS,
    QUICK_PARTS,
    QUICK_S,
    ROUND_S,
    ROUNDS,
    parts_of_round,
    seconds_for,
)
from benchmarks.gpu.report import verdict, write_results
from benchmarks.gpu.tables import tables_of
from benchmarks.lib.tables import WIDTH, show
from benchmarks.lib.verdict import exit_status

TINY_S = 3600.0  # no minutes are to be kept: however slow the machine, all of it is to run


def main() -> int:
    """Run the parts, print their tables and one line of JSON.

    1 if a target is missed or a cell failed.
    """
    options = _options()
    device = options.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    is_cuda = device.startswith("cuda")
    if not is_cuda and not options.tiny:
        print("benchmarks.gpu needs a GPU; --tiny shows that it runs")
        print(json.dumps({"benchmark": "gpu", "skipped": "no CUDA device"}))
        return 0
    about = {
        "benchmark": "gpu",
        "quick": options.quick,
        "tiny": options.tiny,
        "machine": machine(device),
    }
    with tempfile.TemporaryDirectory(prefix="darkroom-gpu-") as nowhere:
        folder = options.results or (
            Path(nowhere) if options.tiny else REPO / "benchmarks" / "results"
        )
        parts = _run_parts(options, device, folder, about)
        _show(parts)
        last = about | verdict(parts, tiny=options.tiny, is_cuda=is_cuda)
        file = write_results(folder, last | _as_json(parts), _label(options))
        if folder != Path(nowhere):
            print(f"written to {file}")
    if not is_cuda:
        print("measured on a CPU: no target was judged")
    print(json.dumps(last))
    return 1 if last["failed"] else exit_status(last["met"])


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--round", type=int, choices=ROUNDS, help="what nine minutes suffice for")
    which.add_argument("--only", nargs="+", choices=list(PARTS), metavar="PART", help="some parts")
    add("--quick", action="store_true", help="end within a minute: fewer images, one part")
    add("--tiny", action="store_true", help="tiny networks, on any device: shows that it runs")
    add("--minutes", type=float, help="begin nothing that would not end within these")
    add("--device", help="cuda:0 where there is one; cpu is for --tiny")
    add("--results", type=Path, help="folder to write to; unless --tiny, benchmarks/results")
    return parser.parse_args()


def _names(options: argparse.Namespace) -> list[str]:
    """List the parts that are asked for."""
    if options.only:
        return list(options.only)
    if options.round:
        return parts_of_round(options.round)
    return list(QUICK_PARTS if options.quick else PARTS)


def _seconds(options: argparse.Namespace, names: Sequence[str]) -> float:
    """Return how long all of it may take."""
    if options.minutes:
        return float(60 * options.minutes)
    if options.tiny:
        return TINY_S
    if options.quick:
        return QUICK_S
    return ROUND_S if options.round else sum(PARTS[name].needs_s for name in names)


def _label(options: argparse.Namespace) -> str:
    """Return what was run, for the file's name."""
    kinds = [kind for kind in ("quick", "tiny") if getattr(options, kind)]
    chosen = [f"round-{options.round}"] if options.round else list(options.only or [])
    return "-".join([*chosen, *kinds]) or "all"


def _run_parts(
    options: argparse.Namespace, device: str, folder: Path, about: Mapping[str, Any]
) -> dict[str, Part]:
    """Run one part after the other; write what was found after each."""
    names = _names(options)
    end = time.monotonic() + _seconds(options, names)
    parts: dict[str, Part] = {}
    for place, name in enumerate(names):
        left_s = max(end - time.monotonic(), 0.0)
        parts[name] = run_part(
            name,
            left_s if options.tiny else seconds_for(name, names[place + 1 :], left_s),
            device=device,
            quick=options.quick,
            tiny=options.tiny,
            traces=folder,
        )
        write_results(folder, {**about, **_as_json(parts)}, _label(options))
    return parts


def _as_json(parts: Mapping[str, Part]) -> dict[str, Any]:
    return {"parts": {name: asdict(part) for name, part in parts.items()}}


def _show(parts: Mapping[str, Part]) -> None:
    show(*tables_of(parts), width=WIDTH)
    for name, part in parts.items():
        for cell, why in part.left_out.items():
            print(f"left out: {name}, {cell}: {why}")
        for cell, why in part.failed.items():
            print(f"failed: {name}, {cell}: {why}")


if __name__ == "__main__":
    sys.exit(main())
