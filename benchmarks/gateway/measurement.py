"""What is measured of the gateway: beside the bare route, beside streams, with many jobs."""

import statistics
from collections import defaultdict
from dataclasses import dataclass, field

from benchmarks.gateway.setup import STREAMS, Figures, Setup

CLIENTS = (1, 32, 256)
MANY_CLIENTS = 32


@dataclass
class Findings:
    """What the run gave; lists have a value a round."""

    rows: int  # of finished jobs, in the end
    # By number of clients and route, "ours" or "bare".
    compared: dict[int, dict[str, list[Figures]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )
    one_tenant: list[Figures] = field(default_factory=list)
    p99_ms_without_streams: list[float] = field(default_factory=list)
    p99_ms_with_streams: list[float] = field(default_factory=list)
    resident_kib: int = 0  # of the gateway, with streams
    grown_ratios: list[float] = field(default_factory=list)  # throughput, ours / bare


def measure(setup: Setup, rounds: int, seconds: float, rows: int) -> Findings:
    """Measure all; every load lasts so many seconds."""
    findings = Findings(rows)
    setup.settle()
    for turn in range(rounds):
        _compare(setup, turn, seconds, findings)
    for _ in range(rounds):
        _with_streams(setup, seconds, findings)
    setup.grow(rows)
    for _ in range(rounds):
        bare_per_s = setup.bare.load(MANY_CLIENTS, seconds)["per_s"]
        ours_per_s = setup.ours.load(MANY_CLIENTS, seconds)["per_s"]
        findings.grown_ratios.append(ours_per_s / bare_per_s)
    return findings


def _compare(setup: Setup, turn: int, seconds: float, findings: Findings) -> None:
    """Load both routes with each number of clients; and ours with one tenant's key alone."""
    routes = [("bare", setup.bare), ("ours", setup.ours)]
    for clients in CLIENTS:
        for name, route in routes if turn % 2 else reversed(routes):
            findings.compared[clients][name].append(route.load(clients, seconds))
    findings.one_tenant.append(setup.ours.load(MANY_CLIENTS, seconds, tenants=1))


def _with_streams(setup: Setup, seconds: float, findings: Findings) -> None:
    """Load ours without and with open streams."""
    without = setup.ours.load(MANY_CLIENTS, seconds)
    findings.p99_ms_without_streams.append(without["p99_ms"])
    with setup.open_streams(STREAMS):
        beside = setup.ours.load(MANY_CLIENTS, seconds)
        findings.p99_ms_with_streams.append(beside["p99_ms"])
        findings.resident_kib = max(findings.resident_kib, setup.resident_kib())


def median_of(figures: list[Figures], name: str) -> float:
    """Return the median of one figure over all rounds."""
    return float(statistics.median(figure[name] for figure in figures))
