"""Figures, tables and the results file of the GPU benchmark."""

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.gpu.models import MODELS, ROWS
from benchmarks.gpu.parts import Part
from benchmarks.lib.tables import make_table
from benchmarks.lib.verdict import Target

TARGETS = (
    # Images/s, one image at a time, neither compiled.
    Target("sdxl_ours_to_plain", ">=", 0.95),
    Target("flux_ours_to_plain", ">=", 0.95),
    Target("share_invariant", ">=", 1.0),
    Target("share_resumed", ">=", 1.0),
)
GIB = 2**30


def figures_of(parts: Mapping[str, Part]) -> dict[str, Any]:
    """Return the numbers to remember, of the cells there are."""
    figures: dict[str, Any] = {}
    for name in MODELS:
        if name in parts:
            figures |= _speed_figures(name, parts[name].cells)
    if "invariance" in parts and (bits := list(parts["invariance"].cells.values())):
        figures |= {
            "bit_cells": len(bits),
            "share_invariant": sum(cell["invariant"] for cell in bits) / len(bits),
            "share_resumed": sum(cell["resumed"] for cell in bits) / len(bits),
        }
    return figures


def table_of(name: str, part: Part) -> Table:
    """Make the table of a part."""
    if name == "invariance":
        return _bits_table(part)
    return _curves_table(part) if name == "curves" else _speed_table(name, part)


def write_results(folder: Path, contents: dict[str, Any], only: str | None) -> Path:
    """Write results whole; return the file.

    It is named for the GPU, the day and, where it ran alone, the part.
    """
    machine = contents["machine"]
    name = machine.get("gpu", machine["device"]).lower().replace(":", " ")
    day = datetime.now(UTC).date().isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / ("-".join([*name.split(), day, *([only] if only else [])]) + ".json")
    file.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    return file


def _speed_figures(name: str, cells: Mapping[str, Any]) -> dict[str, Any]:
    figures: dict[str, Any] = {}
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
    for variant in MODELS[name].variants:
        if cell := cells.get(variant):
            figures[f"{name}_{variant}_images_per_s"] = cell["images_per_s"]
            figures[f"{name}_{variant}_busy_images_per_s"] = cell["busy"]["images_per_s"]
    if overlap := cells.get("overlap"):
        figures[f"{name}_decode_hidden_share"] = overlap["hidden_share"]
    return figures


def _speed_table(name: str, part: Part) -> Table:
    table = make_table(
        f"{name}, {MODELS[name].num_steps} steps, random weights",
        (
            "",
            "images/s alone",
            "latency s",
            "images/s busy",
            "rows/forward",
            "device share",
            "first s",
            "peak GiB",
        ),
    )
    eager = part.cells.get("eager", {})
    plain_by_title = {
        "plain diffusers": eager.get("plain"),
        "plain diffusers, compiled": part.cells.get("plain_compiled"),
    }
    for title, plain in plain_by_title.items():
        if plain:
            table.add_row(title, *_plain_cells(plain))
    variants = {f"ours, {variant}": part.cells.get(variant) for variant in MODELS[name].variants}
    for title, ours in {"ours": eager.get("ours"), **variants}.items():
        if ours:
            table.add_row(title, *_ours_cells(ours))
    if overlap := part.cells.get("overlap"):
        hidden = f"{overlap['hidden_share']:.0%}"
        table.caption = f"beside forwards {hidden} of the decodes' time disappears"
    return table


def _plain_cells(plain: Mapping[str, Any]) -> list[str]:
    return [
        f"{plain['images_per_s']:.3f}",
        f"{plain['latency_s']:.3f}",
        "",
        "",
        "",
        f"{plain['first_call_s']:.1f}",
        f"{plain['peak_bytes'] / GIB:.1f}",
    ]


def _ours_cells(ours: Mapping[str, Any]) -> list[str]:
    busy = ours["busy"]
    return [
        f"{ours['images_per_s']:.3f}",
        f"{ours['latency_s']:.3f}",
        f"{busy['images_per_s']:.3f}",
        f"{busy['rows_per_forward']:.1f}",
        f"{busy['device_share']:.3f}",
        f"{ours['start_s']:.1f}",
        f"{busy['peak_bytes'] / GIB:.1f}",
    ]


def _bits_table(part: Part) -> Table:
    columns = ("network", "kernel", "in company", "resumed elsewhere")
    table = make_table("the same to the bit?", columns, left=columns)
    for name, cell in part.cells.items():
        differences = (cell["apart_in_company"], cell["apart_after_resume"])
        told = ("yes" if apart == 0 else f"{apart:.1e} apart" for apart in differences)
        table.add_row(name, cell["kernel"], *told)
    return table


def _curves_table(part: Part) -> Table:
    table = make_table(
        "by rows",
        ("network", "of a forward", *(str(n) for n in ROWS), "knee", "decode"),
        left=("network", "of a forward"),
    )
    for name, curve in part.cells.items():
        step_s = _by_rows(curve["step_s_by_rows"])
        step_bytes = _by_rows(curve["step_bytes_by_rows"])
        rates = {n: n * step_s[1] / seconds for n, seconds in step_s.items()}
        table.add_row(
            name,
            "ms",
            *(_shown(step_s, n, 1000) for n in ROWS),
            str(curve["knee_rows"]),
            f"{1000 * curve['decode_s']:.1f}",
        )
        table.add_row("", "rows/s, times one row's", *(_shown(rates, n) for n in ROWS))
        table.add_row(
            "",
            f"GiB beside {curve['held_bytes'] / GIB:.1f}",
            *(_shown(step_bytes, n, 1 / GIB) for n in ROWS),
            "",
            f"{curve['decode_bytes'] / GIB:.2f}",
        )
    return table


def _by_rows(values: Mapping[str, float]) -> dict[int, float]:
    """Return values by rows as numbers: JSON made them text."""
    return {int(n): value for n, value in values.items()}


def _shown(values: Mapping[int, float], n: int, unit: float = 1.0) -> str:
    return f"{values[n] * unit:.2f}" if n in values else ""
