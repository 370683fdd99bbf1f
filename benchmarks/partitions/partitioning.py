"""Tables of jobs in ranges of time, and what it takes to drop the oldest range."""

import re
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError, OperationalError

import migrations
from benchmarks.lib.queue.acts import ACTS
from benchmarks.lib.queue.database import Queue
from models.ids import first_id

PARTS = 24
PARTITIONED = {"jobs": "id", "artifacts": "job_id", "attempts": "job_id", "images": "job_id"}
LOADED = timedelta(hours=6)  # the ids of the load are spread over the last six hours
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
        f"CREATE TABLE {table}_{number:02} PARTITION OF {table} "
        f"FOR VALUES FROM ({first}) TO ({last})"
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

    Returns the seconds for each table, or what Postgres said; those of the longest claim, before
    and meanwhile; and how many claims Postgres refused, which a worker would try again.
    """
    is_over = threading.Event()
    claims: list[float] = []
    refused = 0

    def claim() -> None:
        nonlocal refused
        act = next(act for act in ACTS if act.name == "claim")
        while not is_over.is_set():
            try:
                claims.append(act.run(queue)[1])
            except OperationalError:  # a deadlock with what detaches
                refused += 1

    client = threading.Thread(target=claim)
    client.start()
    took: dict[str, object] = {}
    try:
        time.sleep(2)
        quiet_s = max(claims)
        claims.clear()
        for table in DETACHED:
            took[table] = _timed(partial(_detach, queue, table))
    finally:
        is_over.set()
        client.join()
    return {
        **took,
        # None: no claim came to its end meanwhile.
        "longest_claim_s": round(max(claims), 3) if claims else None,
        "longest_claim_before_s": round(quiet_s, 3),
        "claims_refused": refused,
    }


def _detach(queue: Queue, table: str) -> None:
    """Detach the oldest range and drop it: a table keeps its foreign keys when it is detached."""
    with queue.owner.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(f"ALTER TABLE {table} DETACH PARTITION {table}_00"))
        connection.execute(text(f"DROP TABLE {table}_00"))


def _timed(act: Callable[[], None]) -> float | str:
    """Return the seconds, or what Postgres said."""
    started_at = time.perf_counter()
    try:
        act()
    except DBAPIError as error:
        return str(error.orig).partition("\n")[0]
    return round(time.perf_counter() - started_at, 3)
