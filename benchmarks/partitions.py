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

import argparse
import random
import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

import migrations
from benchmarks import backlog
from benchmarks.backlog import ACTS, Queue
from edges import telemetry
from models.ids import first_id

PARTS = 24
PARTITIONED = {"jobs": "id", "artifacts": "job_id", "attempts": "job_id", "images": "job_id"}
LOADED = timedelta(hours=6)  # the ids of the load are spread over the last six hours
MOST = {"claim": 1.15, "release": 1.15, "sweep": 1.15, "list": 1.15}  # times the unpartitioned
BASELINE = Path(migrations.__file__).parent / "versions" / "0012_baseline.sql"
DETACHED = ("images", "attempts", "artifacts", "jobs")  # whoever names others goes first


def partitioned_tables(sql: str) -> str:
    """Rewrite the baseline: the four tables in ranges, and without what these cannot have."""
    for table, column in PARTITIONED.items():
        whole = re.search(rf"CREATE TABLE {table} \(.*?\n\)", sql, re.DOTALL)
        assert whole is not None, table
        sql = sql.replace(whole[0], f"{whole[0]} PARTITION BY RANGE ({column})")
    sql = sql.replace("CREATE UNIQUE INDEX jobs_requeued", "CREATE INDEX jobs_requeued")
    sql = sql.replace(",\n    FOREIGN KEY (artifact_id) REFERENCES artifacts (id)", "")
    before, name, after = sql.partition("CREATE TABLE artifacts")
    return before + name + after.replace("PRIMARY KEY (id)", "PRIMARY KEY (id, job_id)", 1)


def partitions() -> list[str]:
    """Return the statements that make the ranges of every table, the oldest first."""
    start = datetime.now(UTC) - LOADED
    ids = [f"'{first_id(start + LOADED * part / PARTS)}'" for part in range(1, PARTS)]
    bounds = zip(["MINVALUE", *ids], [*ids, "MAXVALUE"], strict=True)
    return [
        f"CREATE TABLE {table}_{number:02} PARTITION OF {table} FOR VALUES FROM ({first}) TO ({last})"
        for number, (first, last) in enumerate(bounds)
        for table in PARTITIONED
    ]


def make_partitioned(owner_url: str) -> None:
    """Make the baseline's tables with partitions, at the baseline's revision."""
    revision = "CREATE TABLE alembic_version (version_num varchar(32) PRIMARY KEY)"
    statements = [partitioned_tables(BASELINE.read_text()), *partitions(), revision]
    engine = create_engine(owner_url)
    with engine.begin() as connection:
        for statement in (*statements, "INSERT INTO alembic_version VALUES ('0012')"):
            connection.exec_driver_sql(statement, execution_options={"no_parameters": True})
    engine.dispose()


def detach_oldest(queue: Queue) -> dict[str, object]:
    """Detach and drop the oldest range of each table while another thread claims jobs.

    Seconds for each table, or what Postgres said; and of the longest claim, before and meanwhile.
    """
    is_over = threading.Event()
    claims: list[float] = []

    def claim() -> None:
        act = next(act for act in ACTS if act.name == "claim")
        while not is_over.is_set():
            claims.append(act.run(queue)[1])

    client = threading.Thread(target=claim)
    client.start()
    took: dict[str, object] = {}
    try:
        time.sleep(2)
        quiet_s = max(claims)
        claims.clear()
        for table in DETACHED:
            took[table] = _timed(lambda table=table: _detach(queue, table))  # type: ignore[misc]
    finally:
        is_over.set()
        client.join()
    return {**took, "longest_claim_s": round(max(claims), 3), "longest_claim_before_s": round(quiet_s, 3)}


def _detach(queue: Queue, table: str) -> None:
    """Detach the oldest range and drop it: a table keeps its foreign keys when it is detached."""
    with queue.owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"ALTER TABLE {table} DETACH PARTITION {table}_00"))
        connection.execute(text(f"DROP TABLE {table}_00"))


def _timed(act: Callable[[], None]) -> float | str:
    """Seconds, or what Postgres said."""
    started_at = time.perf_counter()
    try:
        act()
    except DBAPIError as error:
        return str(error.orig).partition("\n")[0]
    return round(time.perf_counter() - started_at, 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="100,000 rows and fewer rounds; ends within a minute")
    parser.add_argument("--explain", action="store_true", help="print the plans of the statements, with partitions")
    options = parser.parse_args()
    telemetry.configure_logs("ERROR")
    random.seed(7)
    rows, rounds = (100_000, 40) if options.quick else (1_000_000, 60)
    with backlog.services() as env:
        queues = [backlog.fill(env, rows, 1), backlog.fill(env, rows, 2, make_tables=make_partitioned)]
        backlog.settle(queues)
        times = backlog.measure(queues, rounds)
        for queue in queues:
            backlog.check(queue)
        if options.explain:
            backlog.explain(queues[1])
        detached = detach_oldest(queues[1])
        for queue in queues:
            queue.app.dispose()
            queue.owner.dispose()
    facts = {"rows": rows, "partitions": PARTS, "detached": detached}
    labels = ("one table", f"{PARTS} partitions")
    backlog.report(times, labels, rounds, benchmark="partitions", most=MOST, facts=facts)


if __name__ == "__main__":
    main()
