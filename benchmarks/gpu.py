"""What the engine gives on a GPU: networks of SDXL's and FLUX.1's size beside plain diffusers, curves by rows, bits by dtype and kernel.

    python -m benchmarks.gpu [--quick] [--only sdxl|flux|invariance|curves] [--minutes 9] [--results FOLDER] [--device cuda:0]
    python -m benchmarks.gpu --tiny [--device cpu]          # tiny networks, anywhere: shows that it runs

Weights are random (`benchmarks/networks`): nothing is downloaded, and what weights say changes cost by no more than a clock does. Each
part has a process of its own, which says what it found cell by cell; a cell that fails, or for which the minutes do not suffice, is
named and harms no other. What was found is written to the results folder after every part. Without a GPU it says so and ends.

sdxl, flux  1024 px in bf16; 20 steps with classifier-free guidance, 28 steps with a distilled one. Plain `pipe()` under torch's own
            settings, before and after the engine, which renders image by image ("alone") and then many at once ("busy": as many rows
            in a forward as its measured curve says). Then the engine with CUDA graphs, channels_last and compiled blocks, the pipeline
            with compiled blocks, and decodes beside forwards. Both sides start from encoded prompts and end with pixels on the host.
invariance  Small networks of every family, fp32, bf16 and fp16, every attention kernel: is an image the same with other neighbours and
            elsewhere in its bucket, and after a snapshot is taken over by a second engine? Latents, state and pixels, to the bit.
curves      Seconds and bytes of a forward of both networks by rows and size, and the knee: the rows at which more do not pay.
"""

import argparse
import json
import operator
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.networks.models import MODELS, ROWS

REPO = Path(__file__).resolve().parent.parent
TARGETS = {
    "sdxl_ours_to_plain": (">=", 0.95),  # images/s, one image at a time, neither compiled
    "flux_ours_to_plain": (">=", 0.95),
    "share_invariant": (">=", 1.0),
    "share_resumed": (">=", 1.0),
}
HOLDS = {">=": operator.ge}
YARDSTICKS = (
    "MLPerf Inference, SDXL on one H200: 2.4 images/s (20 steps, FP8, TensorRT)",
    "FLUX.1-dev on one H100, 28 steps: 6.7 s eager, 4.5 s compiled",
)
SHARES = {"sdxl": 0.28, "flux": 0.34, "invariance": 0.22, "curves": 0.16}  # of the minutes; what a part leaves goes to those behind it
GRACE_S = 30  # beyond its share, before a part is stopped
GIB = 2**30


@dataclass
class Part:
    """What the process of one part said."""

    cells: dict[str, Any] = field(default_factory=dict)
    took_s: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def hear(self, word: dict[str, Any]) -> None:
        """Take in what it said of a cell."""
        name = word["cell"]
        if "found" in word:
            self.cells[name], self.took_s[name] = word["found"], word["took_s"]
        elif "failed" in word:
            self.failed[name] = word["failed"]
        else:
            self.left_out[name] = word["left_out"]


def run(name: str, seconds: float, options: argparse.Namespace) -> Part:
    """Run a part in a fresh process: nothing that another has loaded, broken or left behind weighs on it."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--part", name, "--until", str(time.time() + seconds), "--device", options.device]
    command += [f"--{flag}" for flag in ("quick", "tiny") if getattr(options, flag)]
    quiet = {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONWARNINGS": "ignore"}
    part = Part()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=REPO, env=os.environ | quiet) as process:
        too_late = threading.Timer(seconds + GRACE_S, process.kill)
        too_late.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith('{"cell": '):
                part.hear(json.loads(line))
                print(f"{name}: {line.rstrip()[:180]}", file=sys.stderr, flush=True)
            else:
                sys.stderr.write(line)
        process.wait()
        too_late.cancel()
    if process.returncode:
        part.failed[name] = f"its process ended with {process.returncode}"
    return part


def part_main(options: argparse.Namespace) -> None:
    """The process of one part."""
    from benchmarks.networks.bits import invariance
    from benchmarks.networks.cells import Cells, Setting
    from benchmarks.networks.curves import curves
    from benchmarks.networks.speed import speed

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


# --- what it comes to ---------------------------------------------------------------------------------------------------------------


def figures_of(parts: Mapping[str, Part]) -> dict[str, Any]:
    """The numbers to remember, of the cells there are."""
    figures: dict[str, Any] = {}
    for name, model in MODELS.items():
        cells = parts[name].cells if name in parts else {}
        if eager := cells.get("eager"):
            figures |= {
                f"{name}_plain_images_per_s": eager["plain"]["images_per_s"],
                f"{name}_plain_latency_s": eager["plain"]["latency_s"],
                f"{name}_ours_images_per_s": eager["ours"]["images_per_s"],
                f"{name}_ours_latency_s": eager["ours"]["latency_s"],
                f"{name}_ours_busy_images_per_s": eager["ours"]["busy"]["images_per_s"],
                f"{name}_ours_to_plain": eager["ours_to_plain"],
                f"{name}_knee_rows": eager["ours"]["knee_rows"],
            }
        if compiled := cells.get("plain_compiled"):
            figures[f"{name}_plain_compiled_images_per_s"] = compiled["images_per_s"]
        for variant in model.variants:
            if cell := cells.get(variant):
                figures[f"{name}_{variant}_images_per_s"] = cell["images_per_s"]
                figures[f"{name}_{variant}_busy_images_per_s"] = cell["busy"]["images_per_s"]
        if overlap := cells.get("overlap"):
            figures[f"{name}_decode_hidden_share"] = overlap["hidden_share"]
    if "invariance" in parts and (bits := list(parts["invariance"].cells.values())):
        figures |= {
            "bit_cells": len(bits),
            "share_invariant": sum(cell["invariant"] for cell in bits) / len(bits),
            "share_resumed": sum(cell["resumed"] for cell in bits) / len(bits),
        }
    return figures


def judge(figures: Mapping[str, Any], *, tiny: bool = False) -> dict[str, bool]:
    """Is each target met that there is a figure for? Tiny networks show nothing of speed."""
    judged = {name: target for name, target in TARGETS.items() if name in figures and not (tiny and name.endswith("_to_plain"))}
    return {name: HOLDS[sign](figures[name], bound) for name, (sign, bound) in judged.items()}


def table_of(name: str, part: Part) -> Table:
    """What a part found, for people."""
    if name == "invariance":
        return _bits_table(part)
    return _curves_table(part) if name == "curves" else _speed_table(name, part)


def _speed_table(name: str, part: Part) -> Table:
    table = Table("", title=f"{name}, {MODELS[name].num_steps} steps, random weights")
    for column in ("images/s alone", "latency s", "images/s busy", "rows/forward", "device share", "first s", "peak GiB"):
        table.add_column(column, justify="right")
    eager = part.cells.get("eager", {})
    for title, plain in (("plain diffusers", eager.get("plain")), ("plain diffusers, compiled", part.cells.get("plain_compiled"))):
        if plain:
            rates = [f"{plain['images_per_s']:.3f}", f"{plain['latency_s']:.3f}", "", "", ""]
            table.add_row(title, *rates, f"{plain['first_call_s']:.1f}", f"{plain['peak_bytes'] / GIB:.1f}")
    variants = {f"ours, {variant}": part.cells.get(variant) for variant in MODELS[name].variants}
    for title, ours in {"ours": eager.get("ours"), **variants}.items():
        if ours:
            busy = ours["busy"]
            rates = [f"{ours['images_per_s']:.3f}", f"{ours['latency_s']:.3f}", f"{busy['images_per_s']:.3f}"]
            more = [f"{busy['rows_per_forward']:.1f}", f"{busy['device_share']:.3f}", f"{ours['start_s']:.1f}"]
            table.add_row(title, *rates, *more, f"{busy['peak_bytes'] / GIB:.1f}")
    if overlap := part.cells.get("overlap"):
        table.caption = f"beside forwards {overlap['hidden_share']:.0%} of the decodes' time disappears"
    return table


def _bits_table(part: Part) -> Table:
    table = Table("network", "kernel", "in company", "resumed elsewhere", title="the same to the bit?")
    for name, cell in part.cells.items():
        told = ["yes" if cell[apart] == 0 else f"{cell[apart]:.1e} apart" for apart in ("apart_in_company", "apart_after_resume")]
        table.add_row(name, cell["kernel"], *told)
    return table


def _curves_table(part: Part) -> Table:
    table = Table("network", "of a forward", title="by rows")
    for column in (*(str(n) for n in ROWS), "knee", "decode"):
        table.add_column(column, justify="right")
    for name, curve in part.cells.items():
        step_s, step_bytes = ({int(n): value for n, value in curve[what].items()} for what in ("step_s_by_rows", "step_bytes_by_rows"))
        table.add_row(name, "ms", *(_shown(step_s, n, 1000) for n in ROWS), str(curve["knee_rows"]), f"{1000 * curve['decode_s']:.1f}")
        table.add_row("", "rows/s, times one row's", *(_shown({n: n * step_s[1] / s for n, s in step_s.items()}, n) for n in ROWS))
        bytes_row = [*(_shown(step_bytes, n, 1 / GIB) for n in ROWS), "", f"{curve['decode_bytes'] / GIB:.2f}"]
        table.add_row("", f"GiB beside {curve['held_bytes'] / GIB:.1f}", *bytes_row)
    return table


def _shown(values: Mapping[int, float], n: int, unit: float = 1.0) -> str:
    return f"{values[n] * unit:.2f}" if n in values else ""


# --- where it was measured ----------------------------------------------------------------------------------------------------------


def machine(device: str) -> dict[str, Any]:
    """The device, its driver and the libraries."""
    facts: dict[str, Any] = {
        "device": device,
        "python": platform.python_version(),
        "cpu": platform.machine(),
        "cores": os.cpu_count(),
        "packages": {name: _version(name) for name in ("torch", "diffusers", "transformers", "triton", "numpy")},
    }
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(torch.device(device))
        facts |= {
            "gpu": properties.name,
            "memory_gib": round(properties.total_memory / GIB, 1),
            "multiprocessors": properties.multi_processor_count,
            "driver": _nvidia_smi("driver_version"),
            "power_limit": _nvidia_smi("power.limit"),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return facts


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _nvidia_smi(fact: str) -> str | None:
    """What it says of the first GPU; None where it is not installed or fails."""
    command = ["nvidia-smi", f"--query-gpu={fact}", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split("\n")[0].strip()
    except (OSError, subprocess.SubprocessError):
        return None


def write_down(folder: Path, contents: dict[str, Any], only: str | None) -> Path:
    """Write results whole, named for the GPU, the day and, where it ran alone, the part. Returns the file."""
    name = contents["machine"].get("gpu", contents["machine"]["device"]).lower().replace(":", " ")
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("-".join([*name.split(), datetime.now(UTC).date().isoformat(), *([only] if only else [])]) + ".json")
    file.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    return file


def main() -> int:
    """Run the parts, print their tables and one line of JSON; 1 if a target is missed or a cell failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, kernels and rows")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, on any device: shows that it runs")
    parser.add_argument("--only", choices=list(SHARES), help="one part")
    parser.add_argument("--minutes", type=float, default=9.0, help="begin nothing that would not end within these")
    parser.add_argument("--device", help="cuda:0 where there is one; cpu is for --tiny")
    parser.add_argument("--results", type=Path, help="folder to write to; unless --tiny, benchmarks/results")
    parser.add_argument("--part", choices=list(SHARES), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        part_main(options)
        return 0
    options.device = options.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if not options.device.startswith("cuda") and not options.tiny:
        print("benchmarks/gpu.py needs a GPU; --tiny shows that it runs")
        print(json.dumps({"benchmark": "gpu", "skipped": "no CUDA device"}))
        return 0
    return _run_all(options)


def _run_all(options: argparse.Namespace) -> int:
    end = time.monotonic() + 60 * options.minutes
    folder = options.results or (None if options.tiny else REPO / "benchmarks" / "results")
    about = {"benchmark": "gpu", "quick": options.quick, "tiny": options.tiny, "machine": machine(options.device)}
    names = [options.only] if options.only else list(SHARES)
    parts: dict[str, Part] = {}
    for place, name in enumerate(names):
        share = SHARES[name] / sum(SHARES[later] for later in names[place:])
        parts[name] = run(name, share * max(end - time.monotonic(), 0.0), options)
        if folder is not None:
            write_down(folder, about | {"parts": {name: asdict(part) for name, part in parts.items()}}, options.only)
    for name, part in parts.items():
        Console(width=140).print(table_of(name, part))
    print(*YARDSTICKS, sep="\n")
    for name, part in parts.items():
        if part.left_out:
            print(f"left out of {name} for want of time: {', '.join(part.left_out)}")
        for cell, why in part.failed.items():
            print(f"failed: {name}, {cell}: {why}")
    figures = {name: round(figure, 4) if isinstance(figure, float) else figure for name, figure in figures_of(parts).items()}
    met = judge(figures, tiny=options.tiny)
    last = about | {
        "figures": figures,
        "targets": {name: f"{sign} {bound}" for name, (sign, bound) in TARGETS.items() if name in figures},
        "met": met,
        "failed": [f"{name}, {cell}" for name, part in parts.items() for cell in part.failed],
        "left_out": [f"{name}, {cell}" for name, part in parts.items() for cell in part.left_out],
    }
    if folder is not None:
        file = write_down(folder, last | {"parts": {name: asdict(part) for name, part in parts.items()}}, options.only)
        print(f"written to {file}")
    print(json.dumps(last))
    return 0 if all(met.values()) and not last["failed"] else 1


if __name__ == "__main__":
    sys.exit(main())
