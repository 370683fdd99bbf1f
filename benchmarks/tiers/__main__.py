"""What the fast tier waits for when the other tiers are full, and what they still get when it is.

    python -m benchmarks.tiers [--quick]

One CPU worker of a stack of its own. Fast jobs of 4 steps come one at a time at seeded instants,
whatever became of the earlier ones, with gaps of two to four times what such a job takes on the
idle worker. Rounds go idle, loaded, idle, loaded …, on the same stack with the same instants; in a
loaded one a background load keeps twice as many quality and twice as many batch images unfinished
as the worker has slots, and SQL samples show how many of them ran. Between rounds its jobs are
canceled.

Latency    Accepted to final, by the database's own timestamps: client threads on the same two cores
           would blur what they took themselves. p99 loaded may be 1.5 times p99 idle, plus one
           denoise step of the loaded batch, which is in progress when a fast job comes and cannot
           be taken back. That step is the mean forward of the loaded rounds, from the worker's
           metrics, less the fast jobs' own.
Shares     In one more round the background load keeps the fast tier just as full. Device seconds by
           tier, in windows of 60 s: an attempt's are laid evenly over the time that it ran, so at
           the edges of a window a tier's share may be off by what one of its jobs takes: so much is
           allowed to be missing.
Celery     The same rounds, in turns with ours, with a stock Celery worker: strict priority of
           queues, late acks, a prefetch of one, one render at a time by plain diffusers with as
           many torch threads (stock_worker.py says why so). It writes no row and stores no image.
           The stack's broker is its broker; only one of the two workers has work at any time.
"""

import argparse
import sys

from benchmarks.lib.measured_stack import MeasuredStack, measured_stack
from benchmarks.lib.statistics import percentile
from benchmarks.tiers.report import report_run
from benchmarks.tiers.rounds import FULL, QUICK, measure
from benchmarks.tiers.stock_celery import stock_worker
from benchmarks.tiers.systems import STEPS, Ours, StockCelery
from policy.fleet import parse_fleet
from settings import REPO


def main() -> int:
    """Measure, print tables and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick",
        action="store_true",
        help="ends within a minute; not_judged says what so little cannot show",
    )
    options = parser.parse_args()
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    model = fleet.models[fleet.default_model()]
    checkpoint = str(REPO / model.versions[0].source)
    with (
        stock_worker(checkpoint, model.precision) as connect,
        measured_stack(list(STEPS)) as measured,
    ):
        ours = Ours(measured)
        celery = StockCelery(connect(measured.stack.env["BROKER_URL"]), measured.fleet)
        findings = measure(ours, celery, QUICK if options.quick else FULL)
        of_clients = _client_figures(measured)
    return report_run(ours, findings, of_clients, quick=options.quick)


def _client_figures(measured: MeasuredStack) -> dict[str, object]:
    clients = measured.clients
    accept_s = [seconds for client in clients.values() for seconds in client.accept_s]
    return {
        "accept_p99_s": percentile(accept_s, 0.99),
        "refusals": {tier: client.refusals for tier, client in clients.items()},
    }


if __name__ == "__main__":
    sys.exit(main())
