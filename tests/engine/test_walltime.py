"""What the time of the device thread is spent on: it adds up, and padding has its own account."""

import time

import pytest
from engine_builders import a_request, reproducible

from engine import walltime
from engine.walltime import IDLE, LOADS, TURNS, WallTime
from tests.clocks import KeptClock


def test_seconds_of_each_thing_add_up_and_count_what_is_under_way(monkeypatch):
    clock = KeptClock()
    monkeypatch.setattr(walltime, "time", clock)
    wall = WallTime()
    for doing, seconds in ((IDLE, 3.0), (TURNS, 2.0), (LOADS, 1.0), (TURNS, 4.0)):
        wall.begin(doing)
        clock.go_on(seconds)

    assert wall.seconds() == pytest.approx({IDLE: 3.0, TURNS: 6.0, LOADS: 1.0})

    wall.begin(None)
    clock.go_on(9.0)
    assert wall.seconds() == pytest.approx({IDLE: 3.0, TURNS: 6.0, LOADS: 1.0})


def test_engine_tells_all_of_its_thread_s_time_and_no_more_device_time_than_turns(engine):
    began_at = time.monotonic()
    before = engine.stats()
    since = time.monotonic()
    engine.submit(a_request("a")).result(60)
    inner_s = time.monotonic() - since
    after = engine.stats()
    outer_s = time.monotonic() - began_at

    spent = {doing: after[f"{doing}_s"] - before[f"{doing}_s"] for doing in (IDLE, TURNS, LOADS)}
    assert inner_s - 1e-6 <= sum(spent.values()) <= outer_s + 1e-6
    busy_s = sum(after[key] - before[key] for key in ("encode_s", "forward_s", "decode_s"))
    assert 0 < busy_s <= spent[TURNS]


def test_padding_of_a_pinned_image_is_told_by_its_record_and_by_the_engine(engine):
    before = engine.stats()["padding_s"]

    record = engine.submit(reproducible("a")).result(60).record

    padded = 1 - record.mean_rows / record.bucket_rows
    assert record.padding_s == pytest.approx(padded * record.denoise_s)
    assert record.padding_s > 0
    assert engine.stats()["padding_s"] - before == pytest.approx(record.padding_s)


def test_image_with_a_forward_of_its_own_size_pays_for_no_padding(engine):
    assert engine.submit(a_request("a")).result(60).record.padding_s == 0
