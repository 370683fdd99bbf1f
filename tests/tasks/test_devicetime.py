"""What a worker tells of its time: from its process's start on, in periods under one price."""

import uuid
from datetime import UTC, datetime, timedelta

import pytest

from models.devicetime import DevicePeriod
from policy.workers import WorkerTerms
from tasks import devicetime
from tasks.devicetime import DeviceMeter
from tests.clocks import KeptClock

CHEAP, DEAR = WorkerTerms("", "spot", "any", 1.0), WorkerTerms("", "spot", "any", 2.0)


class Metered:
    """A meter, with the clocks and the engine that it reads. Its process is 5 s old."""

    def __init__(self) -> None:
        self.clock = KeptClock()
        self.moment = datetime(2026, 3, 1, 12, 30, tzinfo=UTC)
        self.stats = dict.fromkeys(("idle_s", "turns_s", "loads_s", "forward_s"), 0.0)
        self.meter: DeviceMeter

    def now(self, zone: object) -> datetime:
        """Stand for `datetime.now`."""
        return self.moment

    def go_on(self, seconds: float, **spent: float) -> None:
        self.clock.go_on(seconds)
        self.moment += timedelta(seconds=seconds)
        for key, more in spent.items():
            self.stats[key] += more

    def period(self, terms: WorkerTerms = CHEAP) -> DevicePeriod:
        return self.meter.period(worker="w", instance=uuid.uuid4(), pool="p", terms=terms)


@pytest.fixture
def metered(monkeypatch) -> Metered:
    metered = Metered()
    monkeypatch.setattr(devicetime, "time", metered.clock)
    monkeypatch.setattr(devicetime, "datetime", metered)
    monkeypatch.setattr(devicetime.processes, "age_s", lambda: 5.0)
    metered.meter = DeviceMeter()
    return metered


def test_time_until_the_engine_is_ready_is_the_start_s(metered):
    metered.go_on(10)
    loading = metered.period().spent
    metered.go_on(2, idle_s=1)  # it has been ready for a second
    metered.meter.watch(lambda: metered.stats)
    metered.go_on(4, turns_s=3, idle_s=1, forward_s=2)
    ready = metered.period().spent

    assert (loading.billed_s, loading.startup_s) == pytest.approx((15, 15))
    assert (ready.billed_s, ready.startup_s, ready.idle_s) == pytest.approx((21, 16, 2))
    assert (ready.turns_s, ready.denoise_s) == pytest.approx((3, 2))


def test_new_price_and_each_new_hour_begin_a_period_and_no_time_is_lost_between(metered):
    metered.meter.watch(lambda: metered.stats)
    metered.go_on(10, turns_s=10)
    cheap = metered.period()
    metered.go_on(5, turns_s=5)
    dear = metered.period(DEAR)
    metered.go_on(3600, idle_s=3600)
    next_hour = metered.period(DEAR)
    metered.go_on(1, idle_s=1)
    again = metered.period(DEAR)

    told = [period.spent.billed_s for period in (cheap, dear, next_hour, again)]
    assert told == pytest.approx([15, 5, 3600, 3601])
    assert (dear.spent.turns_s, next_hour.spent.turns_s) == pytest.approx((5, 0))
    assert len({period.since for period in (cheap, dear, next_hour)}) == 3
    assert again.since == next_hour.since
    assert [period.terms for period in (cheap, dear)] == [CHEAP, DEAR]
