"""List the events that tenants can subscribe to, and decide when a delivery is tried again."""

from policy.states import FINAL_STATES, JobState


def event_of(state: JobState) -> str:
    """Name the event that tells of a job's end in that state."""
    return f"job.{state}"


ENDED_EVENTS = tuple(
    event_of(state) for state in FINAL_STATES
)  # what an endpoint hears of that names none
BUDGET_EVENT = "budget.threshold"  # a part of the tenant's monthly budget is spent
EVENTS = (*ENDED_EVENTS, BUDGET_EVENT)  # all that an endpoint may name
TEST_EVENT = "webhook.test"
MAX_ENDPOINTS = 20  # of one tenant
SECRET_GRACE_S = 86_400.0  # how long the secret before the newest still signs

BACK_OFF_S = (
    5.0,
    30.0,
    120.0,
    600.0,
    1800.0,
    7200.0,
    21_600.0,
)  # after the first attempt, the second, …; then the last again
GIVE_UP_AFTER_S = 3 * 86_400.0
MAX_RETRY_AFTER_S = 3600.0  # of what a receiver asks for
SLOW_AFTER_S = (
    3.0  # an attempt that takes longer makes its endpoint a slow one, until one is quicker
)


def next_try_s(attempts: int, *, draw: float, retry_after_s: float | None) -> float:
    """Return the seconds until the attempt after `attempts` failed ones.

    From half of the step to all of it, so that deliveries that failed together spread out. draw: in
    [0, 1).  retry_after_s: what the receiver's Retry-After says, which is granted within bounds.
    """
    step_s = BACK_OFF_S[min(attempts, len(BACK_OFF_S)) - 1]
    return max(step_s * (0.5 + 0.5 * draw), min(retry_after_s or 0.0, MAX_RETRY_AFTER_S))
