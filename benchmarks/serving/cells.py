"""The arithmetic of the comparison: latencies of one system under one load, and ours against the best of the others. Plain numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

OURS = "ours"


def percentile(values: Sequence[float], share: float) -> float:
    """The least of `values` that at least `share` of them do not exceed (nearest rank): always one that was measured."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


@dataclass
class Cell:
    """One system under one load, over any number of rounds."""

    latencies_s: dict[int, list[float]] = field(default_factory=dict)  # by the request's number of denoise steps
    seconds: float = 0.0  # from the start of the traffic to the last pixels

    def add(self, other: "Cell") -> None:
        """Count another round in."""
        for num_steps, latencies_s in other.latencies_s.items():
            self.latencies_s.setdefault(num_steps, []).extend(latencies_s)
        self.seconds += other.seconds

    @property
    def requests(self) -> int:
        """How many were served."""
        return sum(map(len, self.latencies_s.values()))

    @property
    def images_per_s(self) -> float:
        """Throughput."""
        return self.requests / self.seconds

    def percentile_s(self, share: float, num_steps: int | None = None) -> float:
        """Latency of all requests, or of those with so many steps."""
        chosen = self.latencies_s.values() if num_steps is None else [self.latencies_s[num_steps]]
        return percentile([latency_s for some in chosen for latency_s in some], share)


@dataclass
class Comparison:
    """What all rounds gave."""

    cells: dict[tuple[float, str], Cell]  # by load and system
    capacities: list[float] = field(default_factory=list)  # images/s of sequential calls, one value a round
    http_round_trips_s: list[float] = field(default_factory=list)  # of LitServe without work, one value a round

    def p99_ratio(self, load: float, num_steps: int) -> float:
        """The shortest p99 of the others ÷ ours, for requests of so many steps."""
        return min(cell.percentile_s(0.99, num_steps) for cell in self._others(load)) / self.cells[load, OURS].percentile_s(0.99, num_steps)

    def throughput_ratio(self, load: float) -> float:
        """Our images/s ÷ the most that any of the others made."""
        return self.cells[load, OURS].images_per_s / max(cell.images_per_s for cell in self._others(load))

    def _others(self, load: float) -> list[Cell]:
        return [cell for (at, name), cell in self.cells.items() if at == load and name != OURS]
