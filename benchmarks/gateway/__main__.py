"""What accepting a job costs, next to the least that a durable route can do.

    python -m benchmarks.gateway [--quick]

Accepted jobs per second and their latency. The bare route (bare_route.py) does one INSERT with a
commit and one LPUSH, in plain Flask, under the gateway's own gunicorn configuration, on the same
Postgres and Redis. Both are loaded in turns, by the same cheap clients: 1, 32 and 256 of them, with
the keys of 50 tenants, then of one. No worker runs, so what is measured is the way in and nothing
else; the sweeper does its rounds as always.

Streams: POST by 32 clients with and without 500 open event streams in the same process, in turns.
Growth: the ratio to the bare route before and after 1,000,000 finished jobs of the same tenants lie
in the tables.
"""

import argparse
import sys

from benchmarks.gateway.measurement import measure
from benchmarks.gateway.report import report_run
from benchmarks.gateway.setup import running_gateway


def main() -> int:
    """Measure, print a table and one line of JSON; 1 if a target is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="one short round, 50,000 jobs; ends within a minute"
    )
    options = parser.parse_args()
    rounds = 1 if options.quick else 5
    seconds = 1.0 if options.quick else 5.0
    rows = 50_000 if options.quick else 1_000_000
    with running_gateway() as setup:
        findings = measure(setup, rounds, seconds, rows)
    return report_run(findings)


if __name__ == "__main__":
    sys.exit(main())
