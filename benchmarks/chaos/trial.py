"""The runs of the chaos benchmark on one stack, and what was found wrong in them."""

import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from benchmarks.chaos.faults import Fault, FaultDone, FaultInjector, plan_faults
from benchmarks.chaos.recoveries import added_latency_s, recoveries
from benchmarks.lib.integrity.accounts import Accounts
from benchmarks.lib.integrity.checks import (
    Check,
    full_load,
    hand_off_keys,
    job_checks,
    load_checks,
    orphans,
    same_pixels,
    stack_checks,
)
from benchmarks.lib.integrity.figures import work_figures
from benchmarks.lib.integrity.probe import StackProbe, hears_notices, wait_until
from benchmarks.lib.integrity.records import RunRecords, records_at_the_end
from benchmarks.lib.integrity.report import show_checks
from benchmarks.lib.integrity.submitter import Submitter
from benchmarks.lib.integrity.workload import TIERS, PlannedJob, TierLoad, workload
from benchmarks.lib.progress import log_progress
from benchmarks.lib.statistics import quantiles
from benchmarks.lib.tables import show_figures

FAULT_EVERY_S = 8.0
PATIENCE_S = 300
UNDER_WAY_S = 3.0  # how long jobs of a recovery run before the fault
NOTICE_S = 2.0  # too short for such a job to end
FULL_LOAD = tuple(TierLoad(tier=each.tier, share=1, steps=(2, 4)) for each in TIERS)
LONG_JOBS = (TierLoad(tier="quality", share=1, steps=(60, 60)),)
RUNNING = """
SELECT worker, count(*) AS n FROM jobs WHERE state = 'running' GROUP BY worker ORDER BY n DESC
"""


class Trial:
    """A stack, its fault-free run, and all that was found wrong so far."""

    def __init__(self, probe: StackProbe, *, lease_s: float, quick: bool) -> None:
        self.probe = probe
        self.lease_s = lease_s
        self.quick = quick
        self.wrong: dict[str, int] = {}  # violations by check
        self.figures: dict[str, Any] = {}  # by run
        self.accounts = Accounts(probe)

    def fault_free(self, jobs: Sequence[PlannedJob]) -> RunRecords:
        """Run the jobs with which those of the other runs are compared."""
        reference, _ = self.run("fault-free", jobs)
        self._judge(reference.label, job_checks(self.probe, reference))
        figures = {**work_figures(reference), "time": self.accounts.of_run()}
        show_figures(reference.label, figures)
        self.figures[reference.label] = figures
        return reference

    def chaos(self, seed: int, jobs: Sequence[PlannedJob], reference: RunRecords) -> None:
        """Run the same jobs under the faults of a seed.

        Then the stack must be whole and idle, and take a fresh full load.
        """
        faults = plan_faults(
            seed,
            window_s=jobs[-1].at_s,
            every_s=FAULT_EVERY_S,
            workers=self.probe.workers,
            lease_s=self.lease_s,
            notices=hears_notices(),
            few=self.quick,
        )
        label = f"chaos {seed}"
        lines = (f"{fault.at_s:6.1f} s  {fault}" for fault in faults)
        Console().print(f"{label}: faults", *lines, sep="\n", highlight=False)
        run, done = self.run(label, jobs, faults)
        checks = job_checks(self.probe, run)
        pixels, apart = same_pixels(self.probe, run, reference)
        whole = self._whole_again()
        load = self._full_load(f"load after {label}", seed)
        of_load = load_checks(self.probe, load)
        self._judge(label, [*checks, pixels, whole, *of_load, *stack_checks(self.probe)])
        self._show(run, done, reference, apart)

    def recovery(self, kind: str) -> list[float]:
        """Return the seconds until the jobs of one worker ran again after a fault of a kind.

        Nothing else is amiss, and slots are free elsewhere.
        """
        count = 2 * len(self.probe.workers)
        jobs = [
            PlannedJob(**vars(job) | {"parameters": job.parameters | {"n": 3, "guidance": 1.5}})
            for job in workload(count, every_s=0.01, seed=0, tiers=LONG_JOBS, cancel_share=0)
        ]
        submitter = Submitter(self.probe, f"{kind} drill")
        submitter.submit_in_time(jobs)
        wait_until(lambda: self._running() == len(jobs), 5, every_s=0.1)
        time.sleep(UNDER_WAY_S)
        faults = [
            Fault(
                at_s=0,
                kind=kind,
                target=self.probe.process_of(row["worker"]),
                for_s=NOTICE_S if kind == "notice" else 0,
            )
            for row in self.probe.sql(RUNNING)[:1]  # who has most to lose
        ]
        done = FaultInjector(self.probe, faults).finish()
        run = records_at_the_end(self.probe, submitter, PATIENCE_S)
        self._judge(submitter.label, job_checks(self.probe, run))
        self._whole_again()
        figures = {"jobs_accepted": len(run.jobs), **work_figures(run)}
        self.figures[run.label] = figures
        show_figures(run.label, figures)
        found = recoveries(run, done, self.probe.process_of)
        return list(found.after_kill_s if kind == "kill" else found.after_notice_s)

    def run(
        self, label: str, jobs: Sequence[PlannedJob], faults: Sequence[Fault] = ()
    ) -> tuple[RunRecords, list[FaultDone]]:
        """Ask for all jobs, do what is planned meanwhile, wait until every job has ended."""
        log_progress(f"{label}: {len(jobs)} jobs, {len(faults)} faults")
        submitter = Submitter(self.probe, label)
        injector = FaultInjector(self.probe, faults)
        try:
            submitter.submit_in_time(jobs)
            done = injector.finish()
        except BaseException:
            injector.give_up()
            submitter.give_up()
            raise
        return records_at_the_end(self.probe, submitter, PATIENCE_S), done

    def _full_load(self, label: str, seed: int) -> RunRecords:
        count = full_load(self.probe)
        jobs = workload(count, every_s=0.01, seed=seed, tiers=FULL_LOAD, cancel_share=0)
        return self.run(label, jobs)[0]

    def _running(self) -> int:
        return sum(row["n"] for row in self.probe.sql(RUNNING))

    def _whole_again(self) -> Check:
        """Wait until every worker is back: the one killed last takes its time to load the model."""
        count = len(self.probe.workers)
        since = self.probe.sql("SELECT clock_timestamp() AS now")[0]["now"]
        is_whole = wait_until(
            lambda: self.probe.live_workers() == self.probe.workers_heard_since(since) == count,
            PATIENCE_S,
        )
        wrong = [] if is_whole else ["/readyz says no"]
        return Check.of("every part is ready again", f"{count} workers", wrong)

    def _judge(self, label: str, checks: Sequence[Check]) -> None:
        show_checks(self.probe, label, checks)
        for check in checks:
            self.wrong[check.name] = self.wrong.get(check.name, 0) + len(check.violations)

    def _show(
        self,
        run: RunRecords,
        faults: Sequence[FaultDone],
        reference: RunRecords,
        apart: int | None,
    ) -> None:
        found = recoveries(run, faults, self.probe.process_of)
        submissions = list(run.submissions.values())
        without_effect = [f"{done.fault}: {done.trouble}" for done in faults if done.trouble]
        figures: dict[str, Any] = {
            "jobs_accepted": len(run.jobs),
            "faults_done": sum(not done.trouble for done in faults),
            "faults_without_effect": without_effect,
            "answers_unknown": sum(one.unknown for one in submissions),
            "unknown_but_accepted": sum(one.heard == "found" for one in submissions),
            "accepted_twice": sum(len(jobs) - 1 for jobs in run.by_marker.values()),
            "asked_again": sum(one.retries for one in submissions),
            "added_latency_s": quantiles(added_latency_s(run, reference)),
            "restarted_after_kill_s": quantiles(found.after_kill_s),
            "restarted_after_notice_s": quantiles(found.after_notice_s),
            "restarted_after_lease_loss_s": quantiles(found.after_loss_s),
            "restarted_after_return_s": quantiles(found.after_return_s),
            **work_figures(run),
            "time": self.accounts.of_run(),
            "hand_off_keys_left": hand_off_keys(self.probe),
            "objects_without_artifact": orphans(self.probe, run),
        }
        if apart is not None:
            figures["best_effort_pixels_apart"] = apart
        caption = (
            "from rows; messages that found nothing to do leave none; "
            "restarts amid other faults, so without a bound"
        )
        show_figures(run.label, figures, caption)
        self.figures[run.label] = figures
