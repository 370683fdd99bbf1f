"""One outage under load, and what became of every job meanwhile."""

import threading
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.drill.outages import Outage
from benchmarks.lib import fleet_file, tiny_checkpoint
from benchmarks.lib.integrity.checks import Check, Violation, job_checks
from benchmarks.lib.integrity.figures import work_figures
from benchmarks.lib.integrity.probe import StackProbe
from benchmarks.lib.integrity.records import RunRecords, records_at_the_end
from benchmarks.lib.integrity.report import show_checks
from benchmarks.lib.integrity.submitter import Submitter
from benchmarks.lib.integrity.workload import TierLoad, workload
from benchmarks.lib.progress import log_progress

WORKERS = 1
SLOTS = 8
LEAD_S = 2.0  # of load before the outage
TAIL_S = 3.0  # and after it
EVERY_S = 0.3  # between two jobs
PATIENCE_S = 120
TIERS = (
    TierLoad(tier="fast", share=0.7, steps=(2, 8)),
    TierLoad(tier="quality", share=0.2, steps=(6, 20)),
    TierLoad(tier="batch", share=0.1, steps=(6, 20)),
)


@dataclass(frozen=True)
class DrillRun:
    """What came of one outage."""

    outage: Outage
    records: RunRecords
    ended: tuple[str, ...]  # processes
    back_s: float | None
    extra_messages: int  # for storing, at any moment, beyond the images that were to be stored

    def figures(self) -> dict[str, Any]:
        """Count what is judged, and what is told beside it."""
        jobs = self.records.jobs
        waits_s = [
            (job["started_at"] - job["accepted_at"]).total_seconds()
            for job in jobs
            if job["tier"] == "fast" and job["started_at"]
        ]
        return {
            "jobs": len(jobs),
            "processes_ended": len(self.ended),
            "lost": self.records.without_row(),
            "doubled": self.records.doubled(),
            "expired": sum(job["state"] == "expired" for job in jobs),
            "failed": sum(job["state"] == "failed" for job in jobs),
            "rendered_twice": work_figures(self.records)["images_rendered_twice"],
            "extra_messages": self.extra_messages,
            "fast_wait_max_s": round(max(waits_s, default=0.0), 1),
            "back_s": self.back_s,
        }


class MessageWatch:
    """Looks, a few times a second, by how many messages for storing exceed the images to store."""

    def __init__(self, probe: StackProbe) -> None:
        self._probe = probe
        self._most = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> int:
        """Stop looking; return the most that was seen."""
        self._stop.set()
        self._thread.join()
        return self._most

    def _run(self) -> None:
        names = [name for name in self._probe.queues if name.startswith("results.")]
        query = "SELECT count(*) AS n FROM images WHERE state = 'handed_off'"
        while not self._stop.wait(0.3):
            try:
                messages = sum(self._probe.broker.llen(name) for name in names)
                self._most = max(self._most, messages - int(self._probe.sql(query)[0]["n"]))
            except Exception:  # noqa: BLE001 - a service is away, which is what this is about
                continue


def write_fleet_file(folder: Path) -> Path:
    """Write the fleet.toml of small workers, with the repository's own start deadlines."""
    tables = fleet_file.small_workers(tiny_checkpoint.save(folder / "checkpoint"), slots=SLOTS)
    for name, tier in fleet_file.shipped()["tiers"].items():
        tables["tiers"][name]["start_within_s"] = tier["start_within_s"]
    return fleet_file.write(tables, folder / "fleet.toml")


def run_outage(probe: StackProbe, outage: Outage, for_s: float) -> DrillRun:
    """Make load, the outage in the midst of it, and wait until every job has ended."""
    log_progress(str(outage))
    count = int((LEAD_S + for_s + TAIL_S) / EVERY_S)
    jobs = workload(count, every_s=EVERY_S, seed=0, tiers=TIERS, cancel_share=0)
    submitter = Submitter(probe, str(outage))
    before = _pids(probe)
    asking = threading.Thread(target=submitter.submit_in_time, args=(jobs,), daemon=True)
    watch = MessageWatch(probe)
    asking.start()
    time.sleep(LEAD_S)
    with outage.lasting():
        time.sleep(for_s)
    over_at = datetime.now(UTC)
    asking.join()
    records = records_at_the_end(probe, submitter, PATIENCE_S)
    after = _pids(probe)
    return DrillRun(
        outage=outage,
        records=records,
        ended=tuple(
            name for name, pid in before.items() if after.get(name) != pid and name != outage.part
        ),
        back_s=_first_stored_s(records, over_at),
        extra_messages=watch.stop(),
    )


def violations(probe: StackProbe, run: DrillRun) -> int:
    """Check one run, and show the checks if any fails; return the number of violations."""
    ended = tuple(Violation(f"{name} ended") for name in run.ended)
    checks = [
        *job_checks(probe, run.records),
        Check("no process ended", "every process", ended),
    ]
    count = sum(len(check.violations) for check in checks)
    if count:
        show_checks(probe, str(run.outage), checks)
    return count


def _first_stored_s(records: RunRecords, over_at: datetime) -> float | None:
    """Return the seconds from an instant to the first artifact after it."""
    instants = [row["created_at"] for rows in records.artifacts.values() for row in rows]
    after = [at for at in instants if at > over_at]
    return round((min(after) - over_at).total_seconds(), 2) if after else None


def _pids(probe: StackProbe) -> dict[str, int | None]:
    return {status.name: status.pid for status in probe.stack.status()}
