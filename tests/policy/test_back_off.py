"""When a webhook is tried again."""

from hypothesis import given
from hypothesis import strategies as st

from policy.webhooks import BACK_OFF_S, GIVE_UP_AFTER_S, MAX_RETRY_AFTER_S, next_try_s


def test_each_attempt_waits_longer_until_the_longest_step():
    waits = [next_try_s(attempts, draw=1.0, retry_after_s=None) for attempts in range(1, 12)]

    assert waits[: len(BACK_OFF_S)] == list(BACK_OFF_S)
    assert set(waits[len(BACK_OFF_S) :]) == {BACK_OFF_S[-1]}


def test_three_days_hold_more_than_a_dozen_attempts():
    waits = [next_try_s(attempts, draw=0.5, retry_after_s=None) for attempts in range(1, 40)]

    told = sum(sum(waits[:number]) < GIVE_UP_AFTER_S for number in range(1, 40))
    assert 12 < told < 39


@given(
    attempts=st.integers(1, 1000),
    draw=st.floats(0, 1, exclude_max=True),
    retry_after_s=st.none() | st.floats(0, 1e9),
)
def test_a_receiver_s_retry_after_is_granted_within_bounds_and_never_shortens_the_wait(
    attempts, draw, retry_after_s
):
    wait_s = next_try_s(attempts, draw=draw, retry_after_s=retry_after_s)

    plain_s = next_try_s(attempts, draw=draw, retry_after_s=None)
    assert plain_s <= wait_s <= max(plain_s, MAX_RETRY_AFTER_S)
    assert retry_after_s is None or wait_s >= min(retry_after_s, MAX_RETRY_AFTER_S)
