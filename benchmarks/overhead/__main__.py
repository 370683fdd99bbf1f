"""What the platform costs, and what batching gives back: images/s through REST to S3.

    python -m benchmarks.overhead [--quick]

Against plain pipeline calls. Both sides run the same checkpoint, size, sampler, steps, guidance and
precision with the same number of torch threads, on the same machine, in turns: a stretch of plain
`StableDiffusionPipeline` calls, one after the other, before and after every stretch of requests.
The ratio of each stretch is taken against the plain stretches beside it, for machines drift.
"""

import argparse
import statistics
import sys

from benchmarks.lib.stack import running_stack, temporary_folder
from benchmarks.lib.tables import make_table, show
from benchmarks.lib.verdict import Target, report
from benchmarks.overhead.measurement import FULL, IN_FLIGHT, QUICK, TIER, Findings, measure
from benchmarks.overhead.plain_calls import STEPS, TORCH_THREADS, PlainCalls
from darkroom_client import Client
from policy.fleet import parse_fleet
from settings import REPO

# With 16 in flight, batching must more than pay for the way through Darkroom.
TARGETS = (Target("ratio_at_16", ">", 1.0),)


def main() -> int:
    """Measure, print a table and one line of JSON; 1 if the target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images; ends within a minute")
    options = parser.parse_args()
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    model = next(iter(fleet.models.values()))
    checkpoint = REPO / model.versions[0].source
    with temporary_folder() as folder, running_stack(folder) as stack:
        client = Client(stack.env["DARKROOM_URL"], stack.env["DARKROOM_API_KEY"])
        plain = PlainCalls(checkpoint, model.precision, model.default_guidance)
        findings = measure(client, plain, QUICK if options.quick else FULL)
        plain.close()
    return _report(findings, plain.facts, model.precision)


def _report(findings: Findings, facts: dict[str, object], precision: str) -> int:
    plain_rate = statistics.median(findings.plain_rates)
    table = make_table(
        f"{STEPS} steps with CFG, tier {TIER}, {precision}, "
        f"{TORCH_THREADS} torch thread on both sides, {facts['device']}",
        (
            "requests in flight",
            "images/s through REST to S3",
            "plain calls, images/s",
            "ratio",
        ),
    )
    figures: dict[str, object] = {
        "plain_images_per_s": round(plain_rate, 3),
        "plain_spread": [
            round(min(findings.plain_rates), 3),
            round(max(findings.plain_rates), 3),
        ],
    }
    for in_flight in IN_FLIGHT:
        rate = statistics.median(findings.rates[in_flight])
        ratio = statistics.median(findings.ratios[in_flight])
        table.add_row(str(in_flight), f"{rate:.2f}", f"{plain_rate:.2f}", f"{ratio:.2f}")
        figures[f"images_per_s_at_{in_flight}"] = round(rate, 3)
        figures[f"ratio_at_{in_flight}"] = round(ratio, 3)
    show(table)
    return report("overhead", figures, TARGETS, facts=facts)


if __name__ == "__main__":
    sys.exit(main())
