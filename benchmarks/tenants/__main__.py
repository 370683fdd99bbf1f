"""What twenty light tenants notice of one that dumps 5,000 jobs into their tier.

    python -m benchmarks.tenants [--quick] [--rounds 2] [--tier quality|batch]

And whether the dump leaves anything of the worker idle. One CPU worker of a stack of its own. First
comes its capacity: a bulk tenant alone, with work always waiting. The light tenants ask at seeded
instants of a Poisson process, together for 35 % of that, each for as many jobs as the others; every
job of the run has 20 steps. Rounds go light alone, dump alone, light with the dump, with the same
instants in both light stretches, on the same stack; a dump lands before its stretches and what is
left of it is canceled after them, so the next round begins with an idle worker again.

Tier        `quality` by default: its forwards have a pinned number of rows, so a light job's step
            takes as long in company as alone, and what it loses to the dump is its turn. In a
            best-effort tier forwards grow with the work there is, and a part of the difference is
            the batching that gives the throughput.
Latency     Accepted to final by the database's own timestamps; p99 over all light jobs of all
            rounds. What is not served two minutes after the last arrival counts with its age by
            then.
Throughput  Images that succeeded in the seconds between the first and the last light arrival, all
            tenants together, against the dump alone in the same round. busy: encode, denoise and
            decode seconds ÷ seconds that passed, from the worker's metrics; rows: of a forward,
            those that belonged to an image.
Dump        POSTs from eight threads. Refused with 429 or 503 they wait as Retry-After says and go
            on; the stretches begin when all is accepted or the first is refused. Jobs of the tier
            may wait a day in this benchmark's fleet.toml, for 5,000 outlast the usual deadline.
"""

import argparse
import sys
from dataclasses import replace

from benchmarks.lib import fleet_file
from benchmarks.lib.measured_stack import MeasuredStack, measured_stack
from benchmarks.lib.statistics import percentile
from benchmarks.tenants.report import Run, report_run
from benchmarks.tenants.rounds import BULK, FULL, QUICK, Rounds


def main() -> int:
    """Measure, print tables and one line of JSON; 1 if a target is missed."""
    options = _options()
    extent = QUICK if options.quick else replace(FULL, rounds=options.rounds)
    light = [f"light-{number:02}" for number in range(1, extent.light_tenants + 1)]
    tables = fleet_file.shipped()
    tables["tiers"][options.tier]["start_within_s"] = fleet_file.A_DAY_S
    with measured_stack([BULK, *light], tables) as measured:
        findings = Rounds(measured, light, options.tier, extent).measure()
        of_clients = _client_figures(measured, light)
    return report_run(Run(extent, options.tier, options.quick), findings, of_clients)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="ends within a minute; not_judged says what so little cannot show",
    )
    add(
        "--rounds",
        type=int,
        default=FULL.rounds,
        help="of a full run; each takes some ten minutes",
    )
    add("--tier", choices=["quality", "batch"], default="quality")
    return parser.parse_args()


def _client_figures(measured: MeasuredStack, light: list[str]) -> dict[str, float]:
    clients = measured.clients
    accept_s = [seconds for name in light for seconds in clients[name].accept_s]
    return {
        "dump_refusals": clients[BULK].refusals,
        "light_refusals": sum(clients[name].refusals for name in light),
        "light_accept_p99_s": percentile(accept_s, 0.99),
    }


if __name__ == "__main__":
    sys.exit(main())
