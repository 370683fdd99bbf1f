"""Figures, what was promised of them, and the results file of the GPU benchmark."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.gpu.models import LAUNCHES, MODELS, VARIANTS
from benchmarks.gpu.parts import Part
from benchmarks.gpu.plan import model_of
from benchmarks.lib.verdict import Target, judge, rounded, said

TARGETS = (
    # MLPerf Inference on one H200, FP8 by TensorRT: of our variants the best, many at once.
    Target("sdxl_best_images_per_s", ">=", 2.4),
    # FLUX.1-dev, 28 steps on one H100 with everything: of our variants the best, one at a time.
    Target("flux_best_latency_s", "<=", 2.7),
    # Images/s, neither compiled: one image at a time, and as many rows in a forward.
    Target("sdxl_ours_to_plain", ">=", 0.95),
    Target("flux_ours_to_plain", ">=", 0.95),
    Target("sdxl_busy_to_plain_batched", ">=", 0.95),
    Target("flux_busy_to_plain_batched", ">=", 0.95),
    Target("share_invariant", ">=", 1.0),
    Target("share_resumed", ">=", 1.0),
)
BITS = ("full_bits", "full_bits_variants", "invariance")  # parts
BIT_FIGURES = ("share_invariant", "share_resumed")

Cells = Mapping[str, Any]


def cells_of(name: str, parts: Mapping[str, Part]) -> dict[str, Any]:
    """Return what was found of a model's speed, in whichever of its parts."""
    found: dict[str, Any] = {}
    for part, ran in parts.items():
        if model_of(part) == name:
            found |= ran.cells
    return found


def variants_of(cells: Cells) -> dict[str, Any]:
    """Return what the engine gave by its variants; "eager" is the one without changes."""
    eager = {"eager": cells["eager"]["ours"]} if "eager" in cells else {}
    return eager | {name: cells[name] for name in VARIANTS if name in cells}


def figures_of(parts: Mapping[str, Part]) -> dict[str, Any]:
    """Return the numbers to remember, of the cells there are."""
    figures: dict[str, Any] = {}
    for name in MODELS:
        figures |= _speed_figures(name, cells_of(name, parts))
    bits = [cell for name in BITS if name in parts for cell in parts[name].cells.values()]
    if bits:
        figures |= {
            "bit_cells": len(bits),
            "share_invariant": sum(cell["invariant"] for cell in bits) / len(bits),
            "share_resumed": sum(cell["resumed"] for cell in bits) / len(bits),
        }
    return figures


def verdict(parts: Mapping[str, Part], *, tiny: bool, is_cuda: bool) -> dict[str, Any]:
    """Return figures, targets, which are met, and what failed or was left out.

    Nothing is judged without a GPU, and of tiny networks on one only their bits.
    """
    figures = rounded(figures_of(parts))
    targets = [target for target in TARGETS if target.figure in figures]
    not_judged = {}
    for target in targets:
        if not is_cuda:
            not_judged[target.figure] = "measured on a CPU: shows that it runs, no more"
        elif tiny and target.figure not in BIT_FIGURES:
            not_judged[target.figure] = "tiny networks show nothing of speed"
    return {
        "figures": figures,
        "targets": said(targets),
        "met": judge(figures, targets, not_judged),
        "not_judged": not_judged,
        "failed": [f"{name}, {cell}" for name, part in parts.items() for cell in part.failed],
        "left_out": [f"{name}, {cell}" for name, part in parts.items() for cell in part.left_out],
    }


def write_results(folder: Path, contents: dict[str, Any], label: str) -> Path:
    """Write results whole; return the file.

    It is named for the GPU, the day and what was run.
    """
    machine = contents["machine"]
    name = machine.get("gpu", machine["device"]).lower().replace(":", " ")
    day = datetime.now(UTC).date().isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("-".join([*name.split(), day, label]) + ".json")
    file.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    return file


def _speed_figures(name: str, cells: Cells) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    if eager := cells.get("eager"):
        figures |= {
            f"{name}_plain_images_per_s": eager["plain"]["images_per_s"],
            f"{name}_plain_latency_s": eager["plain"]["latency_s"],
            f"{name}_ours_to_plain": eager["ours_to_plain"],
            f"{name}_knee_rows": eager["ours"]["knee_rows"],
        }
    if batched := cells.get("plain_batched"):
        figures[f"{name}_plain_batched_images_per_s"] = batched["images_per_s"]
        if eager:
            ours = eager["ours"]["busy"]["images_per_s"]
            figures[f"{name}_busy_to_plain_batched"] = ours / batched["images_per_s"]
    if compiled := cells.get("plain_compiled"):
        figures[f"{name}_plain_compiled_images_per_s"] = compiled["images_per_s"]
    figures |= _variant_figures(name, variants_of(cells))
    figures |= {
        f"{name}_{variant}_{rows}_rows_{part}": seconds
        for variant, cell in LAUNCHES.items()
        for rows, split in cells.get(cell, {}).items()
        for part, seconds in split.items()
        if seconds is not None
    }
    if overlap := cells.get("overlap"):
        figures[f"{name}_decode_hidden_share"] = overlap["hidden_share"]
    return figures


def _variant_figures(name: str, variants: Cells) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for variant, cell in variants.items():
        figures[f"{name}_{variant}_images_per_s"] = cell["images_per_s"]
        figures[f"{name}_{variant}_latency_s"] = cell["latency_s"]
        figures[f"{name}_{variant}_busy_images_per_s"] = cell["busy"]["images_per_s"]
    if variants:
        rates = {
            variant: max(cell["images_per_s"], cell["busy"]["images_per_s"])
            for variant, cell in variants.items()
        }
        best = max(rates, key=rates.__getitem__)
        figures[f"{name}_best_variant"] = best
        figures[f"{name}_best_images_per_s"] = rates[best]
        figures[f"{name}_best_latency_s"] = min(cell["latency_s"] for cell in variants.values())
    return figures
