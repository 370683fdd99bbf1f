"""What was measured, and what it says of a step beside a load. Plain numbers."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

from benchmarks.lib.statistics import percentile


@dataclass
class Findings:
    """Seconds of steps by stretch, and of what was done beside them.

    A stretch of quiet steps lies before and after each in which a checkpoint comes and goes.
    """

    quiet_s: list[list[float]] = field(default_factory=list)
    reloading_s: list[list[float]] = field(default_factory=list)
    read_s: list[float] = field(default_factory=list)
    warm_up_s: list[float] = field(default_factory=list)
    unload_s: list[float] = field(default_factory=list)

    def ratio(self, share: float) -> float:
        """Return how much longer a percentile is beside a reload: the median of all reloads.

        Each is compared with the quiet steps just before and just after it, so a machine that
        slows down, or has other work for a while, does not decide it.
        """
        quiet = [percentile(stretch, share) for stretch in self.quiet_s]
        return statistics.median(
            percentile(stretch, share) / statistics.fmean((before, after))
            for stretch, before, after in zip(self.reloading_s, quiet[:-1], quiet[1:], strict=True)
        )

    def spread(self, share: float) -> float:
        """Return the largest such percentile of quiet steps ÷ the least: what is noise."""
        quiet = [percentile(stretch, share) for stretch in self.quiet_s]
        return max(quiet) / min(quiet)


def median_percentile(stretches: Sequence[Sequence[float]], share: float) -> float:
    """Return the median over stretches of a percentile of each."""
    return statistics.median(percentile(stretch, share) for stretch in stretches)
