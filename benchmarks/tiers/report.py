"""Figures, tables and verdict of the tiers benchmark."""

import statistics
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from benchmarks.lib.statistics import percentile
from benchmarks.lib.tables import make_table, show
from benchmarks.lib.verdict import Target, report
from benchmarks.tiers.rounds import LOW_TIERS, QUICK, Findings
from benchmarks.tiers.systems import STEPS, Ours

SLOWDOWN = 1.5
# Of the device's seconds, however much the fast tier wants.
SHARES = {"quality": 0.15, "batch": 0.05}
SLOTS_BUSY = 0.9  # of those that lower tiers may take: else nothing was shown
SYSTEMS = {"ours": "Darkroom", "celery": "Celery, strict priority"}


def report_run(
    ours: Ours, findings: Findings, of_clients: Mapping[str, Any], *, quick: bool
) -> int:
    """Print tables and one line of JSON; 1 if a target is missed."""
    step_s = statistics.fmean(ours.step_s)
    allowed_s = SLOWDOWN * findings.cells["ours", "idle"].percentile_s(0.99) + step_s
    show(_latencies_table(findings, step_s, allowed_s), _shares_table(ours, findings))
    figures = _figures(ours, findings, step_s) | dict(of_clients)
    said = f"{SLOWDOWN} x idle p99 + a step = {allowed_s:.3f}"
    targets = [
        Target("fast_p99_loaded_s", "<=", allowed_s, said),
        Target("slots_busy", ">=", SLOTS_BUSY),
        *(_share_target(tier, share, findings) for tier, share in SHARES.items()),
    ]
    not_judged = {}
    if quick:
        not_judged["fast_p99_loaded_s"] = f"{_jobs(findings)} jobs have no p99"
        edges = f"windows of {QUICK.window_s:.0f} s are mostly edges"
        not_judged |= dict.fromkeys((f"least_share_{tier}" for tier in SHARES), edges)
    facts = {"device": "cpu", "torch_threads": 1, "quick": quick}
    return report("tiers", figures, targets, not_judged=not_judged, facts=facts)


def _share_target(tier: str, share: float, findings: Findings) -> Target:
    edge = findings.edges.get(tier, 0.0)
    said = f"{share} less {edge:.4f}, one job at the edge of a window"
    return Target(f"least_share_{tier}", ">=", share - edge, said)


def _figures(ours: Ours, findings: Findings, step_s: float) -> dict[str, Any]:
    cells = findings.cells
    running = _running(findings)
    return {
        "fast_p99_loaded_s": cells["ours", "loaded"].percentile_s(0.99),
        "fast_p99_idle_s": cells["ours", "idle"].percentile_s(0.99),
        "ratio": findings.ratio("ours"),
        "celery_ratio": findings.ratio("celery"),
        "loaded_step_s": step_s,
        "slots_busy": sum(running.values()) / ours.slots_for_lower_tiers,
        **{f"least_share_{tier}": share for tier, share in _least_shares(findings).items()},
        "running_loaded": running,
        "running_saturated": dict(findings.saturated),
        "fast_p50_s": {
            f"{name}_{kind}": cell.percentile_s(0.5) for (name, kind), cell in cells.items()
        },
        "fast_p99_s": {
            f"{name}_{kind}": cell.percentile_s(0.99) for (name, kind), cell in cells.items()
        },
        "fast_p99_s_by_round": {
            f"{name}_{kind}": [percentile(some, 0.99) for some in cell.latencies_s]
            for (name, kind), cell in cells.items()
        },
        "shares_by_window": findings.shares,
        "fast_jobs_per_cell": _jobs(findings),
        "gap_s": list(findings.gap_s),
        "asked_late_s": findings.late_s,
    }


def _latencies_table(findings: Findings, step_s: float, allowed_s: float) -> Table:
    table = make_table(
        f"Fast jobs of {STEPS['fast']} steps: seconds from accepted to final, "
        f"p50/p99 of {_jobs(findings)} each",
        ("", "idle", "loaded", "p99 loaded / idle"),
        caption=f"ours may take {SLOWDOWN} x idle p99 + a step of {step_s * 1000:.0f} ms "
        f"= {allowed_s:.3f} s",
    )
    for name, title in SYSTEMS.items():
        both = (findings.cells[name, kind] for kind in ("idle", "loaded"))
        texts = [f"{cell.percentile_s(0.5):.3f}/{cell.percentile_s(0.99):.3f}" for cell in both]
        table.add_row(title, *texts, f"{findings.ratio(name):.2f}")
    return table


def _shares_table(ours: Ours, findings: Findings) -> Table:
    table = make_table(
        "What the tiers had of the worker",
        (
            "tier",
            "ran while fast was timed",
            "ran while all were full",
            "least device share then",
            "promised",
        ),
        left=("tier",),
        caption=f"{ours.measured.pool.slots} slots, of which lower tiers may take "
        f"{ours.slots_for_lower_tiers}",
    )
    running = _running(findings)
    for tier, share in _least_shares(findings).items():
        table.add_row(
            tier,
            f"{running[tier]:.1f}" if tier in running else "",
            f"{findings.saturated[tier]:.1f}",
            f"{share:.3f}",
            f"{SHARES[tier]:.2f}" if tier in SHARES else "",
        )
    return table


def _jobs(findings: Findings) -> int:
    return sum(map(len, findings.cells["ours", "idle"].latencies_s))


def _running(findings: Findings) -> dict[str, float]:
    """Return the mean images of each lower tier that ran while fast jobs were timed."""
    rounds = findings.cells["ours", "loaded"].running
    return {tier: statistics.fmean(images[tier] for images in rounds) for tier in LOW_TIERS}


def _least_shares(findings: Findings) -> dict[str, float]:
    return {tier: min(window[tier] for window in findings.shares) for tier in STEPS}
