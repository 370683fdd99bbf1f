"""Cancel one running job after the other on a busy worker, and find in its log when it was gone."""

import json
import random
import time
from dataclasses import dataclass
from datetime import datetime

from benchmarks.lib.background_load import BackgroundLoad
from benchmarks.lib.measured_stack import MeasuredStack

TIER = "batch"
BACKGROUND = "background"
CANCELING = "canceling"
TENANTS = (BACKGROUND, CANCELING)
JOB = {"prompt": "a large red circle on a blue background", "tier": TIER, "steps": 60}


@dataclass(frozen=True)
class Canceled:
    """What came of all cancels."""

    cancels: int
    waits_s: list[float]  # from the request until the image had left the device
    step_s: float  # mean forward meanwhile
    mean_rows: float
    most_attempts_of_others: int


def measure(measured: MeasuredStack, count: int, draw: random.Random) -> Canceled:
    """Cancel so many jobs while the background load keeps the worker busy."""
    slots = measured.pool.slots
    background = BackgroundLoad(
        lambda: measured.queries.levels([BACKGROUND]),
        lambda tier, stop: measured.clients[BACKGROUND].submit(JOB, stop),
        {TIER: 2 * slots},
    )
    with background:
        background.wait_running(slots // 2, within_s=30)
        before = measured.metrics.read()
        asked_at = dict(cancel_one(measured, draw) for _ in range(count))
        during = measured.metrics.read() - before
    time.sleep(1)
    gone_at = left_the_device(measured)
    return Canceled(
        cancels=len(asked_at),
        waits_s=[gone_at[job_id] - at for job_id, at in asked_at.items() if job_id in gone_at],
        step_s=during.stage_s["denoise"] / during.forwards,
        mean_rows=during.mean_rows,
        most_attempts_of_others=measured.queries.most_attempts(BACKGROUND),
    )


def cancel_one(measured: MeasuredStack, draw: random.Random) -> tuple[str, float]:
    """Submit a job, let it run for a while, cancel it; return its id and when that was asked."""
    client = measured.clients[CANCELING]
    job_id = client.submit(JOB)
    assert job_id is not None
    while measured.queries.levels([CANCELING]).running.get(TIER, 0) == 0:
        time.sleep(0.02)
    time.sleep(draw.uniform(0.2, 0.8))
    at = time.time()
    client.cancel([job_id])
    return job_id, at


def left_the_device(measured: MeasuredStack) -> dict[str, float]:
    """Return when the worker had dropped each job's images, by job, as its log says."""
    gone_at = {}
    for line in measured.stack.log_path("worker").read_text().splitlines():
        if "render_dropped" in line:
            event = json.loads(line)
            gone_at[event["job_id"]] = datetime.fromisoformat(event["timestamp"]).timestamp()
    return gone_at
