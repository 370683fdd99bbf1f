"""Is it time to partition jobs? Every act at 1,000,000 jobs, in one table and in 24 partitions.

    python -m benchmarks.partitions [--quick] [--explain]

As `benchmarks.backlog`, with two databases of the same size: in the second one jobs, images,
attempts and artifacts are partitioned by ranges of the job's id, which are ranges of time, for ids
are UUIDv7. Each of the 24 is a quarter of an hour rather than a month, so that the same sweeps find
the same work; planner and executor do not care. What cannot be said of partitioned tables is left
out there: that a job is requeued once, that an artifact's id is unique by itself, and that an image
names an artifact that there is.

In the end the oldest range of the four tables is detached and dropped, while somebody claims jobs:
how long that takes, table by table, and how long the longest claim took.

It decides nothing, and ends with 0 whatever the ratios are: docs/partitions.md says what followed.
"""

from benchmarks.lib.queue import comparison
from benchmarks.lib.queue.database import fill
from benchmarks.lib.stack import running_services, temporary_folder
from benchmarks.partitions.partitioning import PARTS, detach_oldest, make_partitioned

# Times the unpartitioned.
MOST = {"claim": 1.15, "release": 1.15, "sweep": 1.15, "list": 1.15}


def main() -> None:
    """Measure, print a table and one line of JSON."""
    options = comparison.read_options(__doc__, explained="with partitions")
    rows = 100_000 if options.quick else 1_000_000
    rounds = 40 if options.quick else 60
    with temporary_folder() as folder, running_services(folder) as env:
        queues = [fill(env, rows, 1), fill(env, rows, 2, make_tables=make_partitioned)]
        times = comparison.compare(queues, rounds, explains=options.explain)
        detached = detach_oldest(queues[1])
        for queue in queues:
            queue.close()
    comparison.report_times(
        times,
        ("one table", f"{PARTS} partitions"),
        rounds,
        benchmark="partitions",
        most=MOST,
        facts={"rows": rows, "partitions": PARTS, "detached": detached},
    )


if __name__ == "__main__":
    main()
