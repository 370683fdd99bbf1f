"""What became of the jobs of one run: rows, and nothing but rows."""

import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from benchmarks.survival.customers import Asked, Customers
from benchmarks.survival.faults import Done
from benchmarks.survival.rig import Rig, Row
from benchmarks.survival.workload import marker_of
from policy.states import FINAL_STATES, JobState

FINAL_EVENTS = [f"job:state:{state.value}" for state in FINAL_STATES]


@dataclass(frozen=True)
class Ledger:
    """One run's jobs with their attempts, artifacts and counted events. Jobs of one marker: one, or more if it was accepted twice."""

    label: str
    asked: Mapping[str, Asked]
    faults: list[Done]
    jobs: list[Row]
    attempts: Mapping[uuid.UUID, list[Row]]
    artifacts: Mapping[uuid.UUID, list[Row]]
    final_events: Mapping[uuid.UUID, list[str]]
    hand_offs: Mapping[uuid.UUID, Counter[int]]  # how often each image was handed off, by index
    by_marker: Mapping[str, list[Row]] = field(repr=False)

    @property
    def ids(self) -> list[uuid.UUID]:
        return [job["id"] for job in self.jobs]

    def succeeded(self) -> list[Row]:
        return [job for job in self.jobs if job["state"] == JobState.SUCCEEDED]

    def asked_of(self, job: Row) -> Asked | None:
        return self.asked.get(marker_of(job["prompt"]))


def count_active(rig: Rig, customers: Customers) -> int:
    """Jobs of these tenants that are in no final state."""
    query = "SELECT count(*) AS n FROM jobs WHERE tenant_id = ANY(CAST(:tenants AS uuid[])) AND finished_at IS NULL"
    return int(rig.sql(query, tenants=customers.tenant_ids)[0]["n"])


def read(rig: Rig, customers: Customers, faults: list[Done]) -> Ledger:
    """Everything the database knows of these tenants' jobs."""
    tenants = customers.tenant_ids
    of_tenants = "job_id IN (SELECT id FROM jobs WHERE tenant_id = ANY(CAST(:tenants AS uuid[])))"
    jobs = rig.sql("SELECT * FROM jobs WHERE tenant_id = ANY(CAST(:tenants AS uuid[])) ORDER BY id", tenants=tenants)
    events = "SELECT job_id, event, facts FROM audit_events WHERE event = ANY(:events) AND " + of_tenants
    final_events: dict[uuid.UUID, list[str]] = defaultdict(list)
    for row in rig.sql(f"{events} ORDER BY seq", tenants=tenants, events=FINAL_EVENTS):
        final_events[row["job_id"]].append(row["event"])
    hand_offs: dict[uuid.UUID, Counter[int]] = defaultdict(Counter)
    for row in rig.sql(events, tenants=tenants, events=["job:image:handed-off"]):
        hand_offs[row["job_id"]][row["facts"]["index"]] += 1
    by_marker: dict[str, list[Row]] = defaultdict(list)
    for job in jobs:
        by_marker[marker_of(job["prompt"])].append(job)
    return Ledger(
        label=customers.label,
        asked=customers.asked,
        faults=faults,
        jobs=jobs,
        attempts=_by_job(rig.sql(f"SELECT * FROM attempts WHERE {of_tenants} ORDER BY job_id, attempt", tenants=tenants)),
        artifacts=_by_job(rig.sql(f'SELECT * FROM artifacts WHERE {of_tenants} ORDER BY job_id, "index"', tenants=tenants)),
        final_events=final_events,
        hand_offs=hand_offs,
        by_marker=by_marker,
    )


def story(rig: Rig, job_id: uuid.UUID) -> list[str]:
    """Everything that happened to one job, a line an event, and its attempts."""
    events = rig.sql("SELECT at, event, actor, attempt, facts_text FROM audit_log WHERE job_id = :id ORDER BY seq", id=job_id)
    lines = [f"{_clock(row['at'])} {row['event']} by {row['actor']} attempt {row['attempt']} {row['facts_text'] or ''}" for row in events]
    for row in rig.sql("SELECT * FROM attempts WHERE job_id = :id ORDER BY attempt", id=job_id):
        span = f"{_clock(row['started_at'])} to {_clock(row['ended_at'])}"
        lines.append(f"{span} attempt {row['attempt']} on {row['worker']}: {row['outcome']} {row['error'] or ''}")
    return lines


def _clock(at: datetime | None) -> str:
    return f"{at:%H:%M:%S.%f}" if at else "now"


def _by_job(rows: list[Row]) -> dict[uuid.UUID, list[Row]]:
    found: dict[uuid.UUID, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["job_id"]].append(row)
    return found
