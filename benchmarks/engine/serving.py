"""Part `serving`: the engine beside three other ways to serve."""

import statistics
from typing import Any

from rich.table import Table

from benchmarks.engine.cells import Cell, Comparison
from benchmarks.engine.part import Part, first_model
from benchmarks.engine.traffic import MIX
from benchmarks.lib.tables import make_table

ALL_AND_KINDS = (None, *(kind.num_steps for kind in MIX))


def serving(quick: bool, device: str) -> Part:
    """Serve the same traffic with ours and with the three others."""
    from benchmarks.engine.comparison import compare  # torch: in the part's own process alone

    spec, config, template = first_model(device)
    loads = (1.5,) if quick else (0.8, 1.5)
    rounds = 1 if quick else 5
    requests = 10 if quick else 100
    found = compare(spec, config, template, loads=loads, rounds=rounds, requests=requests)
    round_trip_ms = 1000 * statistics.median(found.http_round_trips_s)
    tables = _tables(found, rounds * requests)
    tables[-1].caption = f"LitServe's latencies contain HTTP: {round_trip_ms:.1f} ms without work"
    figures = {
        "our_images_per_s_to_others_at_1.5x": found.throughput_ratio(1.5),
        "requests_per_cell": rounds * requests,
        "sequential_images_per_s": [round(capacity, 3) for capacity in found.capacities],
        "litserve_round_trip_without_work_ms": round(round_trip_ms, 1),
        "serving": _by_load(found),
    }
    if quick:
        not_judged = {
            "others_p99_to_ours_of_4_steps_at_0.8x": (
                "so few requests have no p99: only 1.5x was run"
            ),
            "our_images_per_s_to_others_at_1.5x": (
                "the last ones of so few requests decide the throughput"
            ),
        }
        return Part(figures, tables, not_judged)
    p99_ratio = found.p99_ratio(0.8, 4)
    return Part({"others_p99_to_ours_of_4_steps_at_0.8x": p99_ratio, **figures}, tables)


def _tables(found: Comparison, requests: int) -> list[Table]:
    """Make a table for each load, a row for each system."""
    kinds = ("all" if steps is None else f"{steps} steps" for steps in ALL_AND_KINDS)
    columns = ("system", "img/s", *kinds)
    tables: dict[float, Table] = {}
    for (load, name), cell in found.cells.items():
        if load not in tables:
            title = f"{load}x: seconds from arrival to pixels, p50/p99 of {requests} requests"
            tables[load] = make_table(title, columns, left=("system",))
        latencies = (
            f"{cell.percentile_s(0.50, steps):.2f}/{cell.percentile_s(0.99, steps):.2f}"
            for steps in ALL_AND_KINDS
        )
        tables[load].add_row(name, f"{cell.images_per_s:.2f}", *latencies)
    return list(tables.values())


def _by_load(found: Comparison) -> dict[str, dict[str, Any]]:
    """Return the figures of each system, by load."""
    by_load: dict[str, dict[str, Any]] = {}
    for (load, name), cell in found.cells.items():
        by_load.setdefault(f"{load}x", {})[name] = _cell_figures(cell)
    return by_load


def _cell_figures(cell: Cell) -> dict[str, float]:
    figures = {"images_per_s": round(cell.images_per_s, 3)}
    for name, share in (("p50", 0.50), ("p99", 0.99)):
        for steps in ALL_AND_KINDS:
            of_steps = "" if steps is None else f"_of_{steps}_steps"
            figures[f"{name}_s{of_steps}"] = round(cell.percentile_s(share, steps), 3)
    return figures
