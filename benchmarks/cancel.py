"""How soon a cancel takes effect: from the client's request to the moment the image has left the device, on a worker full of others.

    python -m benchmarks.cancel [--quick]

A feeder keeps every slot of one CPU worker busy; one job after the other is submitted and, once it runs, canceled over REST at a random
moment. The worker logs when its images have left the engine; that log and the benchmark read the same machine's clock. The others must
not notice: every one of the feeder's jobs that was running is running or rendered afterwards, and none was tried twice.
"""

import argparse
import json
import random
import time
from datetime import datetime

from rich.console import Console
from rich.table import Table

from benchmarks.serving.cells import percentile
from benchmarks.sharing.feeding import Feeder
from benchmarks.sharing.house import House, running_house
from benchmarks.sharing.verdict import Target, report

CANCELS, QUICK_CANCELS = 200, 25
MARGIN_S = 0.1
TIER, CROWD, FICKLE = "batch", "crowd", "fickle"
WISH = {"prompt": "a large red circle on a blue background", "tier": TIER, "steps": 60}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer cancels, under a minute")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    draw = random.Random(options.seed)
    with running_house([CROWD, FICKLE]) as house:
        wanted = {TIER: 2 * house.pool.slots}
        with Feeder(lambda: house.ledger.levels([CROWD]), lambda tier, stop: house.doors[CROWD].ask(WISH, stop), wanted) as feeder:
            feeder.wait_running(house.pool.slots // 2, within_s=30)
            before = house.meter.read()
            asked = [cancel_one(house, draw) for _ in range(QUICK_CANCELS if options.quick else CANCELS)]
            during = house.meter.read() - before
        time.sleep(1)
        gone = left_the_device(house)
        tried = house.ledger.most_attempts(CROWD)
    waits = sorted(gone[job_id] - at for job_id, at in asked if job_id in gone)
    step_s = during.stage_s["denoise"] / during.forwards
    figures = {
        "cancels": len(asked),
        "left_the_device": len(waits),
        "p50_s": percentile(waits, 0.50),
        "p99_s": percentile(waits, 0.99),
        "max_s": waits[-1],
        "step_s": step_s,
        "mean_rows": during.mean_rows,
        "most_attempts_of_others": tried,
    }
    show(figures)
    targets = [
        Target("p99_s", "<=", step_s + MARGIN_S, f"one step ({step_s:.3f} s) + {MARGIN_S} s"),
        Target("left_the_device", ">=", len(asked)),
        Target("most_attempts_of_others", "<=", 1),
    ]
    return report("cancel", figures, targets, {}, {"seed": options.seed})


def cancel_one(house: House, draw: random.Random) -> tuple[str, float]:
    """Submit a job, let it run for a while, cancel it; its id, and when the cancel was asked for."""
    door = house.doors[FICKLE]
    job_id = door.ask(WISH)
    assert job_id is not None
    while house.ledger.levels([FICKLE]).running.get(TIER, 0) == 0:
        time.sleep(0.02)
    time.sleep(draw.uniform(0.2, 0.8))
    at = time.time()
    door.cancel([job_id])
    return job_id, at


def left_the_device(house: House) -> dict[str, float]:
    """When the worker had dropped each job's images, by job, as its log says."""
    gone = {}
    for line in house.stack.log_path("worker").read_text().splitlines():
        if "render_dropped" in line:
            event = json.loads(line)
            gone[event["job_id"]] = datetime.fromisoformat(event["timestamp"]).timestamp()
    return gone


def show(figures: dict[str, float]) -> None:
    table = Table(title="From a cancel over REST to an image off the device")
    for column in ("cancels", "p50 s", "p99 s", "max s", "one step s", "rows of a step"):
        table.add_column(column, justify="right")
    names = ("p50_s", "p99_s", "max_s", "step_s", "mean_rows")
    table.add_row(str(figures["cancels"]), *(f"{figures[name]:.3f}" for name in names))
    Console().print(table)


if __name__ == "__main__":
    raise SystemExit(main())
