"""What `deploy.health` says of a process: that its loops move, or which of them stands still."""

import time

import pytest

from deploy import health
from edges import telemetry
from tests.builders import a_closed_port


@pytest.fixture(scope="module")
def port() -> int:
    port = a_closed_port()
    telemetry.serve_metrics(port)
    return port


@pytest.fixture
def metrics(port) -> str:
    """The metrics of this process, as a container's health check asks for them.

    No loop has moved yet.
    """
    telemetry.LAST_TURN.clear()
    return f"http://127.0.0.1:{port}/metrics"


def test_a_process_whose_loops_move_is_well(metrics):
    telemetry.loop("consumer")()

    assert "consumer" in health._answer(metrics)


def test_a_loop_that_never_moved_since_it_was_made_is_named(metrics):
    telemetry.loop("sweep")
    telemetry.LAST_TURN.labels("sweep").set(time.time() - health.STALE_AFTER_S - 1)

    with pytest.raises(SystemExit, match="stands still: sweep for 61 s"):
        health._answer(metrics)

    telemetry.loop("sweep")()
    assert "sweep" in health._answer(metrics)


def test_a_loop_that_ended_on_purpose_is_not_missed(metrics):
    telemetry.loop("leases")
    telemetry.LAST_TURN.labels("leases").set(time.time() - health.STALE_AFTER_S - 1)

    telemetry.end_loop("leases")

    assert "leases" not in health._answer(metrics)


def test_a_port_that_nobody_listens_on_is_not_well():
    with pytest.raises(SystemExit):
        health._answer(f"http://127.0.0.1:{a_closed_port()}/metrics")
