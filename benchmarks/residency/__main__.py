"""What it costs that a device holds two of the three models that are asked for.

    python -m benchmarks.residency [--quick]

The first model of fleet.toml stands for three. Jobs ask for them by Zipf's law, sixteen in hand at
a time as a worker has them: once with all three loaded, once with room for two, where models are
loaded and unloaded as a worker of a pool with `residency = "lru"` does. Then the steps of an image
of one model, while the other two take turns beside it. One engine at a time, with one torch thread.
"""

import argparse
import os
import sys
from typing import TYPE_CHECKING

from benchmarks.lib.tables import make_table, show
from benchmarks.lib.verdict import Target, report

if TYPE_CHECKING:
    from benchmarks.residency.measurement import Served, StepTimes

TARGETS = (
    Target("wrong", "==", 0),
    Target("rate_ratio", ">=", 0.4),
    # Patience, and twice what is in hand and a swap: another model may be brought before it.
    Target("longest_wait_share", "<=", 1.0),
    Target("step_p50_ratio", "<=", 1.05),
    Target("step_p99_ratio", "<=", 2.0),  # the other model's first image takes turns with it
)

STEP_FIGURES = ("step_p50_ratio", "step_p99_ratio")
BUSY_LOAD = 0.5  # at the start; from there on steps are long for other reasons


def main() -> int:
    """Measure, print a table and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer jobs; ends within a minute")
    options = parser.parse_args()
    os.environ |= {  # before torch is loaded
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MKL_CBWR": "AUTO,STRICT",
    }
    from benchmarks.residency.measurement import FULL, QUICK, serve, step_times, three_models

    load_at_start = os.getloadavg()[0]  # above 0: the machine had more to do than this
    extent = QUICK if options.quick else FULL
    specs = three_models()
    roomy = serve(specs, extent, most_loaded=3)
    tight = serve(specs, extent, most_loaded=2)
    steps = step_times(specs, extent)
    return _report(roomy, tight, steps, load_at_start)


def _report(roomy: "Served", tight: "Served", steps: "StepTimes", load_at_start: float) -> int:
    from benchmarks.residency.measurement import IN_HAND, PATIENCE_S

    table = make_table("Three models", ("loaded", "images/s", "swaps", "longest wait, s"))
    for name, served in (("all", roomy), ("two", tight)):
        shown = (f"{served.images_per_s:.2f}", str(served.swaps), f"{served.longest_wait_s:.2f}")
        table.add_row(name, *shown)
    show(table)
    bound_s = PATIENCE_S + 2 * (IN_HAND / tight.images_per_s + steps.swap_s)
    figures = {
        "images_per_s_all": roomy.images_per_s,
        "images_per_s_two": tight.images_per_s,
        "rate_ratio": tight.images_per_s / roomy.images_per_s,
        "swaps": tight.swaps,
        "images_per_swap": len(tight.digests) / max(1, tight.swaps),
        "longest_wait_s": tight.longest_wait_s,
        "longest_wait_share": tight.longest_wait_s / bound_s,
        "wrong": sum(one != other for one, other in zip(roomy.digests, tight.digests, strict=True)),
        "step_p50_ratio": steps.ratio(0.5),
        "step_p99_ratio": steps.ratio(0.99),
        "swap_s": steps.swap_s,
    }
    is_busy = load_at_start > BUSY_LOAD
    not_judged = dict.fromkeys(STEP_FIGURES, "the machine had other work") if is_busy else {}
    facts = {"load_at_start": round(load_at_start, 2)}
    return report("residency", figures, TARGETS, not_judged=not_judged, facts=facts)


if __name__ == "__main__":
    sys.exit(main())
