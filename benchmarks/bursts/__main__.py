"""How long fast jobs wait for a worker while bursts come, workers restart, and the pool shrinks.

    python -m benchmarks.bursts [--quick]

One CPU worker of a stack of its own, a second one for the last scene. One tenant sends batches of 6
batch and 6 quality jobs of 8 images, in one request; another asks for a fast job now and then. A
wait is accepted to lease, by the database's own timestamps; of a job that expired, accepted to
expired.

Idle     The worker has nothing else to do: what a lease takes.
Burst    One batch; fast jobs until all of it is rendered, or for `probe_s`.
Restart  Two batches; the worker is told to end with all it can hold in hand, all of which comes
         back at once when it is there again. Fast jobs from the moment on that it takes any.
Scale    Two batches; a second worker starts, takes its part, and is told to end: all it had comes
         to the first one. Fast jobs all the time.

The p99 wait of each may be 1.1 times a denoise step, as the first worker made them meanwhile, plus
what a lease takes on the idle worker.
"""

import argparse
import statistics
import sys
from typing import Any

from benchmarks.bursts.scenes import FULL, QUICK, TENANTS, Scene, Scenes
from benchmarks.lib.measured_stack import measured_stack
from benchmarks.lib.statistics import percentile
from benchmarks.lib.tables import make_table, show
from benchmarks.lib.verdict import Target, report

STEPS_ALLOWED = 1.1
COLUMNS = ("", "jobs", "p50", "p99", "longest", "allowed", "expired", "to the end, p99")


def main() -> int:
    """Measure, print a table and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="the burst alone; ends within a minute"
    )
    options = parser.parse_args()
    extent = QUICK if options.quick else FULL
    with measured_stack(TENANTS, workers=2 if "scale" in extent.scenes else 1) as measured:
        scenes = Scenes(measured, extent)
        scenes.play()
        slots = measured.pool.slots
    facts = {
        "slots": slots,
        "fast_jobs": {name: len(scene.waits_s) for name, scene in scenes.played.items()},
        "device": "cpu",
        "quick": options.quick,
    }
    return _report(scenes.played, facts)


def _report(played: dict[str, Scene], facts: dict[str, Any]) -> int:
    lease_s = played["idle"].p99_s()
    table = make_table(
        "Fast jobs: seconds from accepted to leased",
        (*COLUMNS, "most held of other tiers"),
        caption=f"allowed: {STEPS_ALLOWED} x a step + {lease_s * 1000:.0f} ms for a lease",
    )
    figures: dict[str, Any] = {"lease_p99_s": lease_s}
    targets = []
    for name, scene in played.items():
        allowed_s = STEPS_ALLOWED * scene.step_s + lease_s
        table.add_row(name, *_cells(scene, allowed_s))
        if name != "idle":
            figures |= {
                f"{name}_wait_p99_s": scene.p99_s(),
                f"{name}_step_s": scene.step_s,
                f"{name}_expired": scene.expired,
                f"{name}_most_held": scene.most_held,
            }
            said = f"{STEPS_ALLOWED} x a step + a lease = {allowed_s:.3f}"
            targets += [
                Target(f"{name}_wait_p99_s", "<=", allowed_s, said),
                Target(f"{name}_expired", "<=", 0),
            ]
    show(table)
    return report("bursts", figures, targets, not_judged={}, facts=facts)


def _cells(scene: Scene, allowed_s: float) -> list[str]:
    waits_s = (
        statistics.median(scene.waits_s),
        scene.p99_s(),
        max(scene.waits_s),
        allowed_s,
    )
    held = sorted((tier, images) for tier, images in scene.most_held.items() if tier != "fast")
    return [
        str(len(scene.waits_s)),
        *(f"{seconds:.3f}" for seconds in waits_s),
        str(scene.expired),
        f"{percentile(scene.latencies_s, 0.99):.3f}",
        ", ".join(f"{tier} {images}" for tier, images in held),
    ]


if __name__ == "__main__":
    sys.exit(main())
