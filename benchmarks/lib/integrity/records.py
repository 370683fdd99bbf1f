"""What became of the jobs of one run: rows, and nothing but rows."""

import uuid
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from benchmarks.lib.integrity.probe import Row, StackProbe, wait_until
from benchmarks.lib.integrity.submitter import Submission, Submitter
from benchmarks.lib.integrity.workload import marker_of
from benchmarks.lib.progress import log_progress
from policy.states import FINAL_STATES, JobState

FINAL_EVENTS = [f"job:state:{state.value}" for state in FINAL_STATES]

_OF_TENANTS = "tenant_id = ANY(CAST(:tenants AS uuid[]))"
_JOBS = f"job_id IN (SELECT id FROM jobs WHERE {_OF_TENANTS})"
_ACTIVE = f"SELECT count(*) AS n FROM jobs WHERE {_OF_TENANTS} AND finished_at IS NULL"
_EVENTS = """
SELECT at, event, actor, attempt, facts_text FROM audit_log WHERE job_id = :id ORDER BY seq
"""


@dataclass(frozen=True)
class RunRecords:
    """One run's jobs with their attempts, artifacts and counted events.

    Jobs of one marker: one, or more if it was accepted twice.
    """

    label: str
    submissions: Mapping[str, Submission]
    jobs: list[Row]
    attempts: Mapping[uuid.UUID, list[Row]]
    artifacts: Mapping[uuid.UUID, list[Row]]
    final_events: Mapping[uuid.UUID, list[str]]
    hand_offs: Mapping[uuid.UUID, Counter[int]]  # how often each image was handed off, by index
    by_marker: Mapping[str, list[Row]] = field(repr=False)

    @property
    def ids(self) -> list[uuid.UUID]:
        """Return the ids of all jobs."""
        return [job["id"] for job in self.jobs]

    def succeeded(self) -> list[Row]:
        """Return the jobs that succeeded."""
        return [job for job in self.jobs if job["state"] == JobState.SUCCEEDED]

    def lost(self) -> int:
        """Count the jobs that were accepted and have no row."""
        known = {str(job_id) for job_id in self.ids}
        accepted = (each.job_id for each in self.submissions.values() if each.job_id is not None)
        return sum(job_id not in known for job_id in accepted)

    def without_row(self) -> int:
        """Count the jobs that were asked for and have no row, whatever was answered."""
        known = {str(job_id) for job_id in self.ids}
        return sum(each.job_id not in known for each in self.submissions.values())

    def doubled(self) -> int:
        """Count the jobs with two final events, and those with more artifacts than images."""
        ended_twice = sum(len(events) > 1 for events in self.final_events.values())
        stored_twice = sum(
            len(self.artifacts.get(job["id"], ())) > job["num_images"] for job in self.jobs
        )
        return int(ended_twice + stored_twice)

    def submission_of(self, job: Row) -> Submission | None:
        """Return how this job was asked for."""
        return self.submissions.get(marker_of(job["prompt"]))


def count_active(probe: StackProbe, submitter: Submitter) -> int:
    """Count these tenants' jobs that are in no final state."""
    return int(probe.sql(_ACTIVE, tenants=submitter.tenant_ids)[0]["n"])


def records_at_the_end(
    probe: StackProbe, submitter: Submitter, within_s: float = 600
) -> RunRecords:
    """Wait until every job of these tenants has ended, and read what became of them."""
    if not wait_until(lambda: count_active(probe, submitter) == 0, within_s):
        log_progress(f"{submitter.label}: not all jobs ended within {within_s:g} s")
    return read_records(probe, submitter)


def read_records(probe: StackProbe, submitter: Submitter) -> RunRecords:
    """Read everything the database knows of these tenants' jobs."""
    tenants = submitter.tenant_ids
    jobs = probe.sql(f"SELECT * FROM jobs WHERE {_OF_TENANTS} ORDER BY id", tenants=tenants)
    events = f"SELECT job_id, event, facts FROM audit_events WHERE event = ANY(:events) AND {_JOBS}"
    attempts = f"SELECT * FROM attempts WHERE {_JOBS} ORDER BY job_id, attempt"
    artifacts = f'SELECT * FROM artifacts WHERE {_JOBS} ORDER BY job_id, "index"'
    final_events: dict[uuid.UUID, list[str]] = defaultdict(list)
    for row in probe.sql(f"{events} ORDER BY seq", tenants=tenants, events=FINAL_EVENTS):
        final_events[row["job_id"]].append(row["event"])
    hand_offs: dict[uuid.UUID, Counter[int]] = defaultdict(Counter)
    for row in probe.sql(events, tenants=tenants, events=["job:image:handed-off"]):
        hand_offs[row["job_id"]][row["facts"]["index"]] += 1
    by_marker: dict[str, list[Row]] = defaultdict(list)
    for job in jobs:
        by_marker[marker_of(job["prompt"])].append(job)
    return RunRecords(
        label=submitter.label,
        submissions=submitter.submissions,
        jobs=jobs,
        attempts=_by_job(probe.sql(attempts, tenants=tenants)),
        artifacts=_by_job(probe.sql(artifacts, tenants=tenants)),
        final_events=final_events,
        hand_offs=hand_offs,
        by_marker=by_marker,
    )


def job_history(probe: StackProbe, job_id: uuid.UUID) -> list[str]:
    """Tell everything that happened to one job, a line an event, and its attempts."""
    lines = [
        f"{_clock(row['at'])} {row['event']} by {row['actor']} attempt {row['attempt']} "
        f"{row['facts_text'] or ''}"
        for row in probe.sql(_EVENTS, id=job_id)
    ]
    for row in probe.sql("SELECT * FROM attempts WHERE job_id = :id ORDER BY attempt", id=job_id):
        span = f"{_clock(row['started_at'])} to {_clock(row['ended_at'])}"
        lines.append(
            f"{span} attempt {row['attempt']} on {row['worker']}: {row['outcome']} "
            f"{row['error'] or ''}"
        )
    return lines


def _clock(at: datetime | None) -> str:
    return f"{at:%H:%M:%S.%f}" if at else "now"


def _by_job(rows: list[Row]) -> dict[uuid.UUID, list[Row]]:
    found: dict[uuid.UUID, list[Row]] = defaultdict(list)
    for row in rows:
        found[row["job_id"]].append(row)
    return found
