"""Figures, table and verdict of the tenants benchmark."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.lib.statistics import jain, percentile
from benchmarks.lib.tables import make_table, show
from benchmarks.lib.verdict import Target, report
from benchmarks.tenants.rounds import LOAD, Extent, Findings, Stretch, WorkerShare

TARGETS = (
    Target("light_p99_ratio", "<=", 1.3),
    # The same work on the same worker: the rest is drift and the stretch's two ends.
    Target("images_per_s_to_dump_alone", ">=", 0.9),
    Target("busy_share_with_dump", ">=", 0.95),
    Target("rows_to_dump_alone", ">=", 0.95),
)


@dataclass(frozen=True)
class Run:
    """What was asked for."""

    extent: Extent
    tier: str
    is_quick: bool


def report_run(run: Run, findings: Findings, of_clients: Mapping[str, float]) -> int:
    """Print a table and one line of JSON; 1 if a target is missed."""
    _show(run, findings)
    facts = {"device": "cpu", "torch_threads": 1, "tier": run.tier, "quick": run.is_quick}
    return report(
        "tenants",
        figures_of(findings) | dict(of_clients),
        TARGETS,
        not_judged=_not_judged(run, findings),
        facts=facts,
    )


def figures_of(findings: Findings) -> dict[str, Any]:
    """Work out all figures of a run."""
    alone = _latencies_s(findings.alone)
    dumped = _latencies_s(findings.dumped)
    both = [stretch.worker for stretch in findings.dumped]
    light = [stretch.worker for stretch in findings.alone]
    dump = findings.dump_alone
    mean_rows = {
        "light_alone": statistics.fmean(worker.mean_rows for worker in light),
        "dump_alone": statistics.fmean(worker.mean_rows for worker in dump),
        "both": statistics.fmean(worker.mean_rows for worker in both),
    }
    jain_of_light = {"alone": _fairness(findings.alone), "dumped": _fairness(findings.dumped)}
    unserved = sum(stretch.unserved for stretch in (*findings.alone, *findings.dumped))
    return {
        "light_p99_ratio": percentile(dumped, 0.99) / percentile(alone, 0.99),
        "light_p50_ratio": percentile(dumped, 0.5) / percentile(alone, 0.5),
        "images_per_s_to_dump_alone": statistics.fmean(
            one.images_per_s / other.images_per_s for one, other in zip(both, dump, strict=True)
        ),
        "busy_share_with_dump": statistics.fmean(worker.busy_share for worker in both),
        "busy_share_light_alone": statistics.fmean(worker.busy_share for worker in light),
        "busy_share_dump_alone": statistics.fmean(worker.busy_share for worker in dump),
        "rows_to_dump_alone": mean_rows["both"] / mean_rows["dump_alone"],
        "mean_rows": mean_rows,
        "images_per_s": {
            "capacity": findings.capacity,
            "light_alone": [worker.images_per_s for worker in light],
            "dump_alone": [worker.images_per_s for worker in dump],
            "both": [worker.images_per_s for worker in both],
        },
        "light_s": {
            "alone_p50": percentile(alone, 0.5),
            "alone_p99": percentile(alone, 0.99),
            "dumped_p50": percentile(dumped, 0.5),
            "dumped_p99": percentile(dumped, 0.99),
            "alone_p99_by_round": [stretch.percentile_s(0.99) for stretch in findings.alone],
            "dumped_p99_by_round": [stretch.percentile_s(0.99) for stretch in findings.dumped],
        },
        "jain_of_light_mean_latencies": jain_of_light,
        "light_jobs_per_condition": len(alone),
        "light_jobs_unserved": unserved,
        "dump_accepted": findings.accepted,
        "dump_accept_s": findings.accept_s,
        "dump_accepted_per_s": statistics.fmean(
            count / seconds
            for count, seconds in zip(findings.accepted, findings.accept_s, strict=True)
        ),
        "asked_late_s": findings.late_s,
    }


def _not_judged(run: Run, findings: Findings) -> dict[str, str]:
    """Say which figures show nothing, and why."""
    found: dict[str, str] = {}
    if run.is_quick:
        found["light_p99_ratio"] = f"{len(_latencies_s(findings.alone))} jobs have no p99"
        too_few = f"{run.extent.alone_s:.0f} s see too few images"
        found |= dict.fromkeys(("images_per_s_to_dump_alone", "rows_to_dump_alone"), too_few)
    if run.tier != "quality":
        found["rows_to_dump_alone"] = (
            "forwards of a best-effort tier have as many rows as are worth their while"
        )
    return found


def _show(run: Run, findings: Findings) -> None:
    jobs = len(_latencies_s(findings.alone))
    table = make_table(
        f"{run.extent.light_tenants} light tenants and a dump of {run.extent.dump} jobs "
        f"in tier {run.tier}, one CPU worker",
        ("round", "light p50/p99, s", "images/s", "busy", "rows"),
        left=("round",),
        caption=f"capacity {findings.capacity:.2f} images/s; the light tenants ask for "
        f"{LOAD:.0%} of it, {jobs} jobs in all",
    )
    rounds = zip(findings.alone, findings.dump_alone, findings.dumped, strict=True)
    for number, (light, dump, both) in enumerate(rounds, start=1):
        table.add_row(f"{number} light alone", _quantiles(light), *_speed(light.worker))
        table.add_row(f"{number} dump alone", "", *_speed(dump))
        table.add_row(f"{number} both", _quantiles(both), *_speed(both.worker))
    show(table)


def _quantiles(stretch: Stretch) -> str:
    return f"{stretch.percentile_s(0.5):.2f}/{stretch.percentile_s(0.99):.2f}"


def _speed(worker: WorkerShare) -> list[str]:
    return [f"{worker.images_per_s:.2f}", f"{worker.busy_share:.2f}", f"{worker.mean_rows:.1f}"]


def _latencies_s(stretches: Sequence[Stretch]) -> list[float]:
    return [latency_s for stretch in stretches for latency_s in stretch.all_latencies_s()]


def _fairness(stretches: Sequence[Stretch]) -> float:
    """Return Jain's index of the light tenants' mean latencies over all rounds.

    1 when all of them waited alike.
    """
    by_tenant: dict[str, list[float]] = {}
    for stretch in stretches:
        for tenant, latencies_s in stretch.latencies_s.items():
            by_tenant.setdefault(tenant, []).extend(latencies_s)
    return jain([statistics.fmean(latencies_s) for latencies_s in by_tenant.values()])
