"""Logs: one whole JSON object a line, whoever writes, and however many at once."""

import json
import subprocess
import sys

from settings import REPO

MANY = """
import logging
from concurrent.futures import ThreadPoolExecutor
import structlog
from edges import telemetry

log = structlog.get_logger("here")
telemetry.configure_logs("INFO")

def say(number):
    log.debug("not_told", number=number)
    log.info("own", number=number, text="é" * 300)
    logging.getLogger("engine").warning("foreign", extra={"number": number})

with ThreadPoolExecutor(16) as threads:
    list(threads.map(say, range(200)))
try:
    1 / 0
except ZeroDivisionError as error:
    log.error("failed", exc_info=error)
"""


def test_every_line_is_a_whole_object_however_many_threads_write():
    done = subprocess.run(
        [sys.executable, "-c", MANY], cwd=REPO, capture_output=True, text=True, check=True
    )

    events = [json.loads(line) for line in done.stderr.splitlines()]

    for name in ("own", "foreign"):
        assert sorted(event["number"] for event in events if event["event"] == name) == list(
            range(200)
        )
    assert {event["event"] for event in events} == {"own", "foreign", "failed"}
    assert all({"level", "timestamp"} <= event.keys() for event in events)
    assert "ZeroDivisionError" in events[-1]["exception"]
