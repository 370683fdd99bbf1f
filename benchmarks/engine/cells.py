"""The arithmetic of the comparison. Plain numbers.

Latencies of one system under one load, and ours against the best of the others.
"""

from dataclasses import dataclass, field

from benchmarks.lib.statistics import percentile

OURS = "ours"


@dataclass
class Cell:
    """One system under one load, over any number of rounds."""

    # By the request's number of denoise steps.
    latencies_s: dict[int, list[float]] = field(default_factory=dict)
    seconds: float = 0.0  # from the start of the traffic to the last pixels

    def add(self, other: "Cell") -> None:
        """Count another round in."""
        for num_steps, latencies_s in other.latencies_s.items():
            self.latencies_s.setdefault(num_steps, []).extend(latencies_s)
        self.seconds += other.seconds

    @property
    def requests(self) -> int:
        """Return how many were served."""
        return sum(map(len, self.latencies_s.values()))

    @property
    def images_per_s(self) -> float:
        """Return the throughput."""
        return self.requests / self.seconds

    def percentile_s(self, share: float, num_steps: int | None = None) -> float:
        """Return a percentile of the latencies of all requests, or of those with so many steps."""
        chosen = self.latencies_s.values() if num_steps is None else [self.latencies_s[num_steps]]
        return percentile([latency_s for some in chosen for latency_s in some], share)


@dataclass
class Comparison:
    """What all rounds gave."""

    cells: dict[tuple[float, str], Cell]  # by load and system
    # Images/s of sequential calls, one value a round.
    capacities: list[float] = field(default_factory=list)
    # Of LitServe without work, one value a round.
    http_round_trips_s: list[float] = field(default_factory=list)

    def p99_ratio(self, load: float, num_steps: int) -> float:
        """Return the shortest p99 of the others ÷ ours, for requests of so many steps."""
        others_s = (cell.percentile_s(0.99, num_steps) for cell in self._others(load))
        return min(others_s) / self.cells[load, OURS].percentile_s(0.99, num_steps)

    def throughput_ratio(self, load: float) -> float:
        """Return our images/s ÷ the most that any of the others made."""
        best = max(cell.images_per_s for cell in self._others(load))
        return self.cells[load, OURS].images_per_s / best

    def _others(self, load: float) -> list[Cell]:
        return [cell for (at, name), cell in self.cells.items() if at == load and name != OURS]
