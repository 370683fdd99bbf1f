"""The object store is tidied soon after something was erased.

Nobody waits for that, or for the broker.
"""

from types import SimpleNamespace

import pytest

from app.services.tidying import ask_to_tidy
from edges.broker import BrokerUnavailable
from policy import queues
from policy.fleet import parse_fleet
from settings import REPO


class ABroker:
    """Takes note of what is asked for; `is_away`: refuses it."""

    def __init__(self, *, is_away: bool) -> None:
        self.is_away = is_away
        self.asked: list[tuple[str, str]] = []

    def ask_for(self, task_name: str, queue: str) -> None:
        self.asked.append((task_name, queue))
        if self.is_away:
            raise BrokerUnavailable("refused")


@pytest.mark.parametrize("is_away", [False, True])
def test_tidying_is_asked_of_the_last_tier_and_fails_nobody_while_the_broker_is_away(is_away):
    fleet = parse_fleet((REPO / "fleet.toml").read_text())
    runtime = SimpleNamespace(fleet=fleet, broker=ABroker(is_away=is_away))

    ask_to_tidy(runtime)

    last_queue = queues.results_queue(fleet, fleet.tiers_by_rank[-1])
    assert runtime.broker.asked == [(queues.TIDY_STORE, last_queue)]
