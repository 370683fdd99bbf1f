"""What was found, as tables for people."""

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from benchmarks.gpu.models import LAUNCHES, MODELS, ROWS
from benchmarks.gpu.parts import Part
from benchmarks.gpu.profiles import KINDS, OTHER
from benchmarks.gpu.report import BITS, cells_of, variants_of
from benchmarks.lib.tables import make_table

GIB = 2**30


def tables_of(parts: Mapping[str, Part]) -> list[Table]:
    """Make the tables of all that was found."""
    tables = []
    if "check" in parts:
        tables.append(_check_table(parts["check"]))
    for name in MODELS:
        cells = cells_of(name, parts)
        if cells:
            tables.append(_speed_table(name, cells))
        if "launches" in cells:
            tables.append(_launches_table(name, cells))
    if "profile" in parts:
        tables.append(_profile_table(parts["profile"]))
    tables += [_bits_table(name, parts[name]) for name in BITS if name in parts]
    if "curves" in parts:
        tables.append(_curves_table(parts["curves"]))
    tables.append(_clocks_table(parts))
    return tables


def _check_table(part: Part) -> Table:
    table = make_table("the device", ("what", "", "found"), left=("what", "", "found"))
    for cell, found in part.cells.items():
        for name, value in found.items():
            shown = f"{value:.6f}" if isinstance(value, float) else str(value)
            table.add_row(cell, name, shown)
    return table


def _speed_table(name: str, cells: Mapping[str, Any]) -> Table:
    columns = (
        "",
        "images/s alone",
        "latency s",
        "images/s busy",
        "rows/forward",
        "device share",
        "first s",
        "peak GiB",
        "reserved GiB",
    )
    table = make_table(f"{name}, {MODELS[name].num_steps} steps, random weights", columns)
    plain_by_title = {
        "plain diffusers": cells.get("eager", {}).get("plain"),
        "plain diffusers, compiled": cells.get("plain_compiled"),
    }
    for title, plain in plain_by_title.items():
        if plain:
            table.add_row(title, *_alone(plain), "", "", "", *_first_and_memory(plain))
    if batched := cells.get("plain_batched"):
        title = f"plain diffusers, {batched['images_per_call']} a call"
        busy = (f"{batched['images_per_s']:.3f}", "", "")
        table.add_row(title, "", "", *busy, *_first_and_memory(batched))
    for variant, ours in variants_of(cells).items():
        table.add_row(f"ours, {variant}", *_alone(ours), *_busy(ours), *_first_and_memory(ours))
    if overlap := cells.get("overlap"):
        hidden = f"{overlap['hidden_share']:.0%}"
        table.caption = f"beside forwards {hidden} of the decodes' time disappears"
    return table


def _alone(cell: Mapping[str, Any]) -> list[str]:
    return [f"{cell['images_per_s']:.3f}", f"{cell['latency_s']:.3f}"]


def _busy(ours: Mapping[str, Any]) -> list[str]:
    busy = ours["busy"]
    return [
        f"{busy['images_per_s']:.3f}",
        f"{busy['rows_per_forward']:.1f}",
        f"{busy['device_share']:.3f}",
    ]


def _first_and_memory(cell: Mapping[str, Any]) -> list[str]:
    most = cell.get("busy", cell)
    return [
        f"{cell.get('start_s', cell.get('first_call_s')):.1f}",
        f"{most['peak_bytes'] / GIB:.1f}",
        f"{most['reserved_bytes'] / GIB:.1f}",
    ]


def _launches_table(name: str, cells: Mapping[str, Any]) -> Table:
    columns = ("forward of", "rows", "launch ms", "device ms")
    table = make_table(f"{name}: host and device", columns, left=columns[:1])
    for variant, cell in LAUNCHES.items():
        for rows, split in cells.get(cell, {}).items():
            table.add_row(variant, rows, _ms(split["launch_s"]), _ms(split["device_s"]))
    return table


def _profile_table(part: Part) -> Table:
    kinds = [*KINDS, OTHER]
    table = make_table(
        "ms of a step by kind",
        ("network", "rows", *kinds, "gaps", "kernels", "trace"),
        left=("network", "trace"),
    )
    for name, cell in part.cells.items():
        steps = cell["steps"]
        seconds = cell["seconds_by_kind"]
        gaps_s = cell["gaps_s"]
        table.add_row(
            name,
            str(cell["rows"]),
            *(_ms(seconds[kind] / steps) for kind in kinds),
            _ms(None if gaps_s is None else gaps_s / steps),
            str(sum(cell["launches_by_kind"].values()) // steps),
            cell["trace"],
        )
    return table


def _bits_table(name: str, part: Part) -> Table:
    columns = ("network", "kernel", "in company", "resumed elsewhere")
    table = make_table(f"{name}: the same to the bit?", columns, left=columns)
    for cell_name, cell in part.cells.items():
        differences = (cell["apart_in_company"], cell["apart_after_resume"])
        told = ("yes" if apart == 0 else f"{apart:.1e} apart" for apart in differences)
        table.add_row(cell_name, cell["kernel"], *told)
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
            f"{name}, {curve['side_px']} px",
            "ms",
            *(_shown(step_s, n, 1000) for n in ROWS),
            str(curve["knee_rows"]),
            _ms(curve["decode_s"]),
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


def _clocks_table(parts: Mapping[str, Part]) -> Table:
    """Make the table of what nvidia-smi told: least, median and most of each part."""
    columns = ("part", "SM MHz", "power W", "temperature", "held back by")
    table = make_table("clocks", columns, left=columns)
    for name, part in parts.items():
        if isinstance(part.clocks, str):
            table.add_row(name, part.clocks)
            continue
        told = part.clocks["meanwhile"]
        table.add_row(
            name,
            *(
                " ".join(f"{value:.0f}" for value in told[fact])
                for fact in ("sm_mhz", "power_w", "temperature_c")
            ),
            ", ".join(part.clocks["held_back_by"]),
        )
    return table


def _ms(seconds: float | None) -> str:
    return "" if seconds is None else f"{1000 * seconds:.1f}"


def _by_rows(values: Mapping[str, float]) -> dict[int, float]:
    """Return values by rows as numbers: JSON made them text."""
    return {int(n): value for n, value in values.items()}


def _shown(values: Mapping[int, float], n: int, unit: float = 1.0) -> str:
    return f"{values[n] * unit:.2f}" if n in values else ""
