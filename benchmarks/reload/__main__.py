"""What a step costs while another checkpoint is loaded and unloaded beside it.

    python -m benchmarks.reload [--quick]

One engine with one torch thread renders images of the first model of fleet.toml, one at a time
and one after the other. Stretches of quiet steps take turns with stretches in which the same files
are loaded under another name and unloaded again. A step is the time between two `Stepped` events of
an image. Percentiles are of each stretch; a ratio is that of a reload to the quiet steps before and
after it, and the figure is the median of all reloads, for machines drift and have other work.
Where the quiet stretches themselves differ too much, the machine had other work, and nothing is
judged.
"""

import argparse
import os
import statistics
import sys
from dataclasses import replace

from benchmarks.lib.tables import make_table, show
from benchmarks.lib.verdict import Target, report
from benchmarks.reload.findings import Findings, median_percentile

# A step may be longer by a twentieth, at the 99th percentile too.
TARGETS = (Target("p50_ratio", "<=", 1.05), Target("p99_ratio", "<=", 1.05))
SHARES = {"p50_ratio": 0.5, "p99_ratio": 0.99}
MOST_SPREAD = 1.5  # of a percentile, from one quiet stretch to another


def main() -> int:
    """Measure, print a table and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps; ends within a minute")
    options = parser.parse_args()
    os.environ |= {  # before torch is loaded
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MKL_CBWR": "AUTO,STRICT",
    }
    from benchmarks.reload.measurement import FULL, QUICK, measure
    from engine.config import EngineConfig
    from engine.engine import Engine
    from policy.fleet import parse_fleet
    from settings import REPO
    from tasks.engines import checkpoint_specs

    load_at_start = os.getloadavg()[0]  # above 0: the machine had more to do than this
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    own = checkpoint_specs(fleet, list(fleet.models)[:1], REPO)[0]
    with Engine(EngineConfig(), [own]) as engine:
        other = replace(own, name="another")
        findings = measure(engine, own, other, QUICK if options.quick else FULL)
    return _report(findings, load_at_start)


def _report(findings: Findings, load_at_start: float) -> int:
    columns = ("", "stretches", "steps", "p50", "p99")
    table = make_table("Steps of an image, ms, medians of stretches", columns)
    for phase, stretches in (("quiet", findings.quiet_s), ("reloading", findings.reloading_s)):
        shown = [f"{median_percentile(stretches, share) * 1000:.2f}" for share in (0.5, 0.99)]
        table.add_row(phase, str(len(stretches)), str(sum(map(len, stretches))), *shown)
    show(table)
    figures = {
        **{name: findings.ratio(share) for name, share in SHARES.items()},
        "quiet_p99_spread": findings.spread(0.99),
        "read_s": statistics.median(findings.read_s),
        "warm_up_s": statistics.median(findings.warm_up_s),
        "unload_s": statistics.median(findings.unload_s),
    }
    not_judged = {
        name: f"quiet steps differ {spread:.1f} times by themselves"
        for name, share in SHARES.items()
        if (spread := findings.spread(share)) > MOST_SPREAD
    }
    facts = {"load_at_start": round(load_at_start, 2)}
    return report("reload", figures, TARGETS, not_judged=not_judged, facts=facts)


if __name__ == "__main__":
    sys.exit(main())
