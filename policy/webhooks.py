"""What tenants can hear of, and when to try again to tell them."""

EVENTS = ("job.succeeded", "job.failed", "job.rejected", "job.canceled", "job.expired")
TEST_EVENT = "webhook.test"
MAX_ENDPOINTS = 20  # of one tenant
SECRET_GRACE_S = 86_400.0  # how long the secret before the newest still signs

BACK_OFF_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 7200.0, 21_600.0)  # after the first attempt, the second, …; then the last again
GIVE_UP_AFTER_S = 3 * 86_400.0
LONGEST_WISH_S = 3600.0  # of a receiver's Retry-After
SLOW_AFTER_S = 3.0  # an attempt that takes longer makes its endpoint a slow one, until one is quicker


def next_try_s(attempts: int, *, draw: float, wish_s: float | None) -> float:
    """Seconds until the attempt after `attempts` failed ones: from half of the step to all of it, so that what failed together spreads.

    draw: in [0, 1).  wish_s: what the receiver's Retry-After says; within bounds it is granted.
    """
    step_s = BACK_OFF_S[min(attempts, len(BACK_OFF_S)) - 1]
    return max(step_s * (0.5 + 0.5 * draw), min(wish_s or 0.0, LONGEST_WISH_S))
