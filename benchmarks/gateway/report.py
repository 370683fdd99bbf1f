"""Figures, table and verdict of the gateway benchmark."""

import statistics
from dataclasses import dataclass

from rich.table import Table

from benchmarks.gateway.measurement import CLIENTS, MANY_CLIENTS, Findings, median_of
from benchmarks.gateway.setup import STREAMS, Figures
from benchmarks.lib.tables import WIDTH, make_table, show
from benchmarks.lib.verdict import Target, report

TARGETS = (
    Target("throughput_ratio", ">=", 0.5),  # the worst over 1, 32 and 256 clients: ours / bare
    Target("p99_ratio", "<=", 5.0),  # the worst of them, the other way round
    Target("streams_p99_ratio", "<=", 1.5),  # POST with 500 open streams / without
    # Throughput beside the bare route's with 1,000,000 jobs / the same with none.
    Target("growth_ratio", ">=", 0.67),
)


@dataclass(frozen=True)
class BothRoutes:
    """Both routes under the same number of clients: medians over all rounds."""

    clients: int
    ours_per_s: float
    bare_per_s: float
    ours_p50_ms: float
    ours_p99_ms: float
    bare_p50_ms: float
    bare_p99_ms: float

    @classmethod
    def of(cls, findings: Findings, clients: int) -> "BothRoutes":
        """Take the medians of one number of clients."""
        ours = findings.compared[clients]["ours"]
        bare = findings.compared[clients]["bare"]
        return cls(
            clients=clients,
            ours_per_s=median_of(ours, "per_s"),
            bare_per_s=median_of(bare, "per_s"),
            ours_p50_ms=median_of(ours, "p50_ms"),
            ours_p99_ms=median_of(ours, "p99_ms"),
            bare_p50_ms=median_of(bare, "p50_ms"),
            bare_p99_ms=median_of(bare, "p99_ms"),
        )

    @property
    def ratio(self) -> float:
        """Return the throughput, ours / bare."""
        return self.ours_per_s / self.bare_per_s

    @property
    def p99_ratio(self) -> float:
        """Return the p99, ours / bare."""
        return self.ours_p99_ms / self.bare_p99_ms

    def figures(self) -> Figures:
        """Return the figures to remember."""
        return {
            "ours_per_s": round(self.ours_per_s, 1),
            "bare_per_s": round(self.bare_per_s, 1),
            "ratio": round(self.ratio, 3),
            "ours_p99_ms": round(self.ours_p99_ms, 2),
            "bare_p99_ms": round(self.bare_p99_ms, 2),
            "p99_ratio": round(self.p99_ratio, 3),
        }

    def cells(self) -> list[str]:
        """Return a row of the table."""
        latencies_ms = (self.ours_p50_ms, self.ours_p99_ms, self.bare_p50_ms, self.bare_p99_ms)
        return [
            str(self.clients),
            f"{self.ours_per_s:.0f}",
            f"{self.bare_per_s:.0f}",
            f"{self.ratio:.2f}",
            *(f"{latency_ms:.1f}" for latency_ms in latencies_ms),
            f"{self.p99_ratio:.2f}",
        ]


def report_run(findings: Findings) -> int:
    """Print a table, a sentence and one line of JSON; 1 if a target is missed."""
    by_clients = [BothRoutes.of(findings, clients) for clients in CLIENTS]
    show(_table(by_clients), width=WIDTH)
    figures = _figures(findings, by_clients)
    print(
        f"one tenant, {MANY_CLIENTS} clients: {figures['one_tenant_per_s']:.0f}/s. "
        f"With {STREAMS} streams: p99 {figures['streams_p99_ratio']:.2f}x, "
        f"gateway {figures['gateway_mib_with_streams']} MiB. "
        f"With {findings.rows:,} jobs: {figures['growth_ratio']:.2f}x of the throughput."
    )
    return report("gateway", figures, TARGETS)


def _figures(findings: Findings, by_clients: list[BothRoutes]) -> Figures:
    of_clients = {f"{both.clients}_clients": both.figures() for both in by_clients}
    without_ms = statistics.median(findings.p99_ms_without_streams)
    beside_ms = statistics.median(findings.p99_ms_with_streams)
    grown = statistics.median(findings.grown_ratios)
    return {
        **of_clients,
        "one_tenant_per_s": round(median_of(findings.one_tenant, "per_s"), 1),
        "p99_ms_without_streams": round(without_ms, 2),
        "p99_ms_with_streams": round(beside_ms, 2),
        "streams": STREAMS,
        "gateway_mib_with_streams": round(findings.resident_kib / 1024),
        "existing_jobs": findings.rows,
        "throughput_ratio": min(each["ratio"] for each in of_clients.values()),
        "p99_ratio": max(each["p99_ratio"] for each in of_clients.values()),
        "streams_p99_ratio": round(beside_ms / without_ms, 3),
        "growth_ratio": round(grown / of_clients[f"{MANY_CLIENTS}_clients"]["ratio"], 3),
    }


def _table(by_clients: list[BothRoutes]) -> Table:
    columns = ("clients", "ours /s", "bare /s", "ratio", "ours p50 ms", "p99")
    table = make_table(
        "POST /v1/jobs beside a bare durable route",
        (*columns, "bare p50 ms", "p99", "p99 ratio"),
    )
    for both in by_clients:
        table.add_row(*both.cells())
    return table
