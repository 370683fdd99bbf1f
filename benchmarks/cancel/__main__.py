"""How soon a cancel takes effect: from the client's request until the image has left the device.

    python -m benchmarks.cancel [--quick]

A background load keeps every slot of one CPU worker busy; one job after the other is submitted and,
once it runs, canceled over REST at a random moment. The worker logs when its images have left the
engine; that log and the benchmark read the same machine's clock. The others must not notice: every
one of the background's jobs that was running is running or rendered afterwards, and none was tried
twice.
"""

import argparse
import random
import sys

from benchmarks.cancel.measurement import TENANTS, measure
from benchmarks.lib.measured_stack import measured_stack
from benchmarks.lib.statistics import percentile
from benchmarks.lib.tables import make_table, show
from benchmarks.lib.verdict import Target, report

CANCELS = 200
QUICK_CANCELS = 25
MARGIN_S = 0.1


def main() -> int:
    """Measure, print a table and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer cancels, under a minute")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    count = QUICK_CANCELS if options.quick else CANCELS
    with measured_stack(TENANTS) as measured:
        found = measure(measured, count, random.Random(options.seed))
    figures = {
        "cancels": found.cancels,
        "left_the_device": len(found.waits_s),
        "p50_s": percentile(found.waits_s, 0.50),
        "p99_s": percentile(found.waits_s, 0.99),
        "max_s": max(found.waits_s),
        "step_s": found.step_s,
        "mean_rows": found.mean_rows,
        "most_attempts_of_others": found.most_attempts_of_others,
    }
    _show(figures)
    bound_s = found.step_s + MARGIN_S
    targets = [
        Target("p99_s", "<=", bound_s, f"one step ({found.step_s:.3f} s) + {MARGIN_S} s"),
        Target("left_the_device", ">=", found.cancels),
        Target("most_attempts_of_others", "<=", 1),
    ]
    return report("cancel", figures, targets, not_judged={}, facts={"seed": options.seed})


def _show(figures: dict[str, float]) -> None:
    columns = ("cancels", "p50 s", "p99 s", "max s", "one step s", "rows of a step")
    table = make_table("From a cancel over REST to an image off the device", columns)
    names = ("p50_s", "p99_s", "max_s", "step_s", "mean_rows")
    table.add_row(str(figures["cancels"]), *(f"{figures[name]:.3f}" for name in names))
    show(table)


if __name__ == "__main__":
    sys.exit(main())
