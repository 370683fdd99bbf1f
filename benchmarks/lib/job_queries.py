"""What happened to jobs, from Postgres: instants are the database's.

So a latency runs from the accepted row to its final state. Reads only: the connection could not
write.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import create_engine, text

PATIENCE_S = 300

_LEVELS = """
SELECT j.tier, sum(j.num_images) AS unfinished,
       coalesce(sum(j.num_images) FILTER (WHERE j.state = 'running'), 0) AS running
FROM jobs j JOIN tenants t ON t.id = j.tenant_id
WHERE j.state IN ('queued', 'running') AND t.name = ANY(:tenants) GROUP BY j.tier
"""

_UNFINISHED = """
SELECT j.id FROM jobs j JOIN tenants t ON t.id = j.tenant_id
WHERE t.name = :tenant AND j.finished_at IS NULL ORDER BY j.id DESC
"""

_WAITING = """
SELECT count(*) AS waiting FROM jobs
WHERE id = ANY(CAST(:job_ids AS uuid[])) AND finished_at IS NULL
"""

_ENDS = """
SELECT t.name AS tenant, j.state, coalesce(j.failure_detail, j.failure_code) AS why,
       j.finished_at IS NOT NULL AS is_final,
       extract(epoch FROM coalesce(j.finished_at, clock_timestamp()) - j.accepted_at)::float
           AS total_s
FROM jobs j JOIN tenants t ON t.id = j.tenant_id
WHERE j.id = ANY(CAST(:job_ids AS uuid[])) ORDER BY j.id
"""

_WAITS = """
SELECT j.state,
       extract(epoch FROM coalesce(j.started_at, j.finished_at, clock_timestamp())
               - j.accepted_at)::float AS wait_s,
       extract(epoch FROM coalesce(j.finished_at, clock_timestamp()) - j.accepted_at)::float
           AS total_s
FROM jobs j WHERE j.id = ANY(CAST(:job_ids AS uuid[])) ORDER BY j.id
"""

_HELD = """
SELECT split_part(j.worker, '@', 1) AS worker, j.tier, count(*) AS images
FROM jobs j JOIN images i ON i.job_id = j.id
WHERE j.state = 'running' AND i.state = 'pending' GROUP BY 1, 2
"""

_FORWARDS = """
SELECT coalesce(sum(a.steps), 0) AS steps, coalesce(sum(a.denoise_s), 0)::float AS denoise_s
FROM attempts a WHERE a.job_id = ANY(CAST(:job_ids AS uuid[]))
"""

# An attempt's device seconds are known when it ends; they are laid evenly over the time that it
# ran, what was canceled included.
_DEVICE_SECONDS = """
SELECT j.tier, count(*) AS attempts, avg(a.device_seconds)::float AS each_s,
       sum(a.device_seconds
           * extract(epoch FROM least(a.ended_at, :end) - greatest(a.started_at, :begin))
           / nullif(extract(epoch FROM a.ended_at - a.started_at), 0))::float AS device_s
FROM attempts a JOIN jobs j ON j.id = a.job_id
WHERE a.started_at < :end AND a.ended_at > :begin AND a.device_seconds > 0 GROUP BY j.tier
"""

_IMAGES = """
SELECT t.name AS tenant, sum(j.num_images) AS images
FROM jobs j JOIN tenants t ON t.id = j.tenant_id
WHERE j.state = 'succeeded' AND j.finished_at > :begin AND j.finished_at <= :end GROUP BY t.name
"""

_MOST_ATTEMPTS = """
SELECT max(j.attempt) AS most FROM jobs j JOIN tenants t ON t.id = j.tenant_id
WHERE t.name = :tenant
"""


@dataclass(frozen=True)
class QueueLevels:
    """Images by tier at one moment. unfinished: queued and running."""

    unfinished: Mapping[str, int]
    running: Mapping[str, int]


@dataclass(frozen=True)
class JobWait:
    """How long a job waited for its first lease, or its end without one; how long for its end."""

    state: str
    wait_s: float
    total_s: float


@dataclass(frozen=True)
class DeviceTime:
    """What one tier had of the device in some window. each_s: of one job, on average."""

    seconds: float
    each_s: float


class JobQueries:
    """Postgres, read as the application role reads it."""

    def __init__(self, database_url: str) -> None:
        read_only = {"options": "-c default_transaction_read_only=on"}
        self._database = create_engine(
            database_url, connect_args=read_only, isolation_level="AUTOCOMMIT", pool_size=4
        )

    def close(self) -> None:
        """Give the connections back."""
        self._database.dispose()

    def now(self) -> datetime:
        """Read the database's clock."""
        at: datetime = self._rows("SELECT clock_timestamp() AS at")[0]["at"]
        return at

    def levels(self, tenants: Sequence[str]) -> QueueLevels:
        """Count what these tenants have waiting or running."""
        rows = self._rows(_LEVELS, tenants=list(tenants))
        return QueueLevels(
            unfinished={row["tier"]: int(row["unfinished"]) for row in rows},
            running={row["tier"]: int(row["running"]) for row in rows},
        )

    def unfinished_ids(self, tenant: str) -> list[str]:
        """Return the tenant's jobs that have no final state, newest first."""
        return [str(row["id"]) for row in self._rows(_UNFINISHED, tenant=tenant)]

    def wait_finished(self, tenant: str) -> None:
        """Return when every job of the tenant has its final state."""
        deadline = time.monotonic() + PATIENCE_S
        while self.unfinished_ids(tenant):
            if time.monotonic() > deadline:
                raise SystemExit(f"jobs of {tenant} do not end")
            time.sleep(0.2)

    def wait_served(self, job_ids: Sequence[str], within_s: float = PATIENCE_S) -> int:
        """Return when all these jobs are final, or after `within_s`: how many are not."""
        deadline = time.monotonic() + within_s
        while waiting := int(self._rows(_WAITING, job_ids=list(job_ids))[0]["waiting"]):
            if time.monotonic() > deadline:
                return waiting
            time.sleep(0.2)
        return 0

    def latencies_s(self, job_ids: Sequence[str]) -> dict[str, list[float]]:
        """Return seconds from accepted to final by tenant; of a job that is not final, to now.

        SystemExit if one did not succeed.
        """
        rows = self._rows(_ENDS, job_ids=list(job_ids))
        failed = [
            f"{row['state']} ({row['why']})"
            for row in rows
            if row["is_final"] and row["state"] != "succeeded"
        ]
        if failed:
            raise SystemExit(
                f"{len(failed)} of {len(job_ids)} jobs did not succeed: "
                f"{', '.join(sorted(set(failed)))}"
            )
        latencies_s: dict[str, list[float]] = {}
        for row in rows:
            latencies_s.setdefault(row["tenant"], []).append(row["total_s"])
        return latencies_s

    def waits(self, job_ids: Sequence[str]) -> list[JobWait]:
        """Return how long each of these jobs waited."""
        return [JobWait(**row) for row in self._rows(_WAITS, job_ids=list(job_ids))]

    def held_by_worker(self) -> dict[str, int]:
        """Count unrendered images of running jobs, by worker: worker-1 and so on."""
        held: dict[str, int] = {}
        for row in self._rows(_HELD):
            held[row["worker"]] = held.get(row["worker"], 0) + int(row["images"])
        return held

    def held_of_one_worker(self) -> dict[str, int]:
        """Return the most of these images that any one worker has, by tier."""
        held: dict[str, int] = {}
        for row in self._rows(_HELD):
            held[row["tier"]] = max(held.get(row["tier"], 0), int(row["images"]))
        return held

    def forwards(self, job_ids: Sequence[str]) -> tuple[int, float]:
        """Sum up these jobs' denoise steps, and their share of those forwards' seconds."""
        [row] = self._rows(_FORWARDS, job_ids=list(job_ids))
        return int(row["steps"]), row["denoise_s"]

    def device_time(self, begin: datetime, end: datetime) -> dict[str, DeviceTime]:
        """Tell who had the device between two instants, by tier.

        Attempts that have not ended yet are not in it.
        """
        rows = self._rows(_DEVICE_SECONDS, begin=begin, end=end)
        return {row["tier"]: DeviceTime(row["device_s"] or 0.0, row["each_s"]) for row in rows}

    def images(self, begin: datetime, end: datetime) -> dict[str, int]:
        """Count the images of jobs that succeeded between two instants, by tenant."""
        return {
            row["tenant"]: int(row["images"]) for row in self._rows(_IMAGES, begin=begin, end=end)
        }

    def most_attempts(self, tenant: str) -> int:
        """Return the number of attempts of the tenant's most tried job."""
        return int(self._rows(_MOST_ATTEMPTS, tenant=tenant)[0]["most"])

    def _rows(self, query: str, **values: Any) -> list[Any]:
        with self._database.connect() as connection:
            return list(connection.execute(text(query), values).mappings())
