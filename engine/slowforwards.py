"""Notice forwards that took far longer than they should have.

What is done for the first time in service makes one: a kernel chosen for a number of rows that the
warm-up did not try, a library loaded, a forward recorded or compiled. So does a device that slows
down. No image is to blame, but all in the forward wait. No torch, no clock.
"""

import logging
from collections.abc import Callable

from engine.costs import CostModel
from engine.scheduler import Batch, Work

log = logging.getLogger(__name__)

SLOW = 3.0  # times the measured curve
LEAST_S = (
    0.1  # beyond it: nobody notices less, and a busy host makes a small network wait that long
)

Charge = Callable[[Work, float, bool], None]


class SlowForwards:
    """Compare each forward with its curve on the way to who is charged for it."""

    def __init__(self, costs: CostModel, charge: Charge) -> None:
        """Start with none. charge: is told of all work, after this was."""
        self._costs = costs
        self._charge = charge
        self.count = 0

    def charge(self, work: Work, seconds: float, was_alone: bool) -> None:
        """Note the seconds of a piece of work before the curve learns of them."""
        if isinstance(work, Batch) and self._costs.is_measured(work.key):
            expected_s = self._costs.step_s(work.key, work.bucket_rows)
            if seconds > max(SLOW * expected_s, expected_s + LEAST_S):
                self._tell(work, seconds, expected_s)
        self._charge(work, seconds, was_alone)

    def _tell(self, batch: Batch, seconds: float, expected_s: float) -> None:
        self.count += 1
        what = {
            "checkpoint": batch.key.checkpoint,
            "size": f"{batch.key.width_px}x{batch.key.height_px}",
            "rows": batch.bucket_rows,
            "seconds": round(seconds, 3),
            "expected_s": round(expected_s, 3),
        }
        log.warning("forward_slow", extra=what)
