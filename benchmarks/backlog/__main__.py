"""Does a long queue make the queue slow? Every act on it at 1,000 and at 1,000,000 waiting jobs.

    python -m benchmarks.backlog [--quick] [--explain]

On one Postgres, in turns. Two databases on the server of a one-machine stack (64 MB of shared
buffers), of which only the four services run. Both hold 50 tenants, 3 tiers, one pool and the same
64 running jobs; one tenant has 60 % of what waits, the others 8 jobs each or 8,000. Another tenth
was accepted before these and left the queue since the last vacuum, as happens to a queue that
moves: their dead entries stand at the heads of its indexes. One round does every act once in both,
the small database first in one round and the large one in the next, so that noise hits both. Ratio:
of the medians; beside it the least and the greatest of five stretches of the run.

Claim, accept, cancel and renewal commit and are timed up to the commit, and with it. A claimed or
canceled job is drawn from all that wait, so its pages are as cold as they get, and another is
accepted in its place, so both queues keep their length. Releases are rolled back, so that they find
the same room every time, and timed up to that: no commit, which costs the same in both, evens out
their ratio. Sweeps, lists and the gateway's reads are timed whole. No job of a sweep is due and all
room is taken, so it looks at everything and finds nothing. Autovacuum runs as it is configured.

--explain prints the plan of every statement of these acts in the large database.
"""

import sys

from benchmarks.lib.queue import comparison
from benchmarks.lib.queue.database import fill
from benchmarks.lib.stack import running_services, temporary_folder

SMALL = 1_000
# The worst ratio of each group of acts, at most.
MOST = {"claim": 1.5, "release": 1.5, "sweep": 1.5, "list": 1.5}


def main() -> int:
    """Measure, print a table and one line of JSON; 1 if a target is missed."""
    options = comparison.read_options(__doc__, explained="in the large database")
    sizes = (SMALL, 100_000 if options.quick else 1_000_000)
    rounds = 40 if options.quick else 300
    with temporary_folder() as folder, running_services(folder) as env:
        queues = [fill(env, rows, number) for number, rows in enumerate(sizes, start=1)]
        times = comparison.compare(queues, rounds, explains=options.explain)
        for queue in queues:
            queue.close()
    labels = [f"{rows:,} rows" for rows in sizes]
    facts = {"rows": list(sizes)}
    return comparison.report_times(
        times, labels, rounds, benchmark="backlog", most=MOST, facts=facts
    )


if __name__ == "__main__":
    sys.exit(main())
