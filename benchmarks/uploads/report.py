"""Figures, table and verdict of the uploads benchmark."""

import statistics
from collections import Counter
from typing import Any

from benchmarks.lib.statistics import percentile
from benchmarks.lib.tables import WIDTH, make_table, show
from benchmarks.lib.verdict import Target, report
from benchmarks.uploads.measurement import Cost, Findings

TARGETS = (
    Target("gateway_cpu_s", "<=", 2.0),  # of the gateway's process for one request, at worst
    Target("decoder_cpu_s", "<=", 2.0),  # of its decoders for one request, at worst
    Target("healthz_p99_ms", "<=", 200.0),  # the worse of both passes
    # Of 5xx: all but the 503 that says that many pictures are being read.
    Target("unexpected_answers", "<=", 0),
)
SHOWN = 12


def report_run(findings: Findings) -> int:
    """Print a table, the figures and one line of JSON; 1 if a target is missed."""
    table = make_table(
        "The costliest bodies",
        ("body", "status", "gateway CPU s", "decoder CPU s", "wall s"),
        left=("body",),
    )
    for cost in sorted(findings.costs, key=_processor_s, reverse=True)[:SHOWN]:
        seconds = (cost.gateway_s, cost.decoders_s, cost.wall_s)
        table.add_row(cost.name[:60], str(cost.status), *(f"{each:.2f}" for each in seconds))
    show(table, width=WIDTH)
    figures = _figures(findings)
    for name, value in figures.items():
        print(f"{name}: {value}")
    return report("uploads", figures, TARGETS)


def _figures(findings: Findings) -> dict[str, Any]:
    costs = findings.costs
    statuses = Counter([*(cost.status for cost in costs), *findings.statuses_at_once])
    one_by_one_ms = findings.health_one_by_one_ms
    at_once_ms = findings.health_at_once_ms
    all_ms = [*one_by_one_ms, *at_once_ms]
    p99s_ms = (percentile(one_by_one_ms, 0.99), percentile(at_once_ms, 0.99))
    return {
        "bodies": statuses.total(),
        "answers": {
            str(status or "503 pictures"): count for status, count in sorted(statuses.items())
        },
        "gateway_cpu_mean_ms": round(1000 * statistics.mean(cost.gateway_s for cost in costs), 2),
        "healthz_p50_ms": round(statistics.median(all_ms), 2),
        "healthz_p99_one_by_one_ms": round(p99s_ms[0], 1),
        "healthz_p99_at_once_ms": round(p99s_ms[1], 1),
        "healthz_worst_ms": round(max(all_ms), 1),
        "seconds": round(findings.took_s, 1),
        "gateway_cpu_s": round(max(cost.gateway_s for cost in costs), 3),
        "decoder_cpu_s": round(max(cost.decoders_s for cost in costs), 3),
        "healthz_p99_ms": round(max(p99s_ms), 1),
        "unexpected_answers": sum(count for status, count in statuses.items() if status >= 500),
    }


def _processor_s(cost: Cost) -> float:
    return cost.gateway_s + cost.decoders_s
