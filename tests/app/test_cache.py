"""What a gateway process remembers: one read for all who ask, and none that is too old."""

import threading
import time
from concurrent.futures import Executor, Future, ThreadPoolExecutor

import pytest

from app.live import cache
from app.live.cache import Cache
from tests.builders import until


class Clock:
    """A clock that goes on when the test says so."""

    now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(cache, "time", clock)
    return clock


class Later(Executor):
    """Does what it was given when the test says so."""

    def __init__(self):
        self.given = []

    def submit(self, work, /, *args):
        future = Future()
        self.given.append((future, work, args))
        return future

    def do_all(self):
        for future, work, args in self.given:
            try:
                future.set_result(work(*args))
            except OSError as error:
                future.set_exception(error)
        self.given.clear()


class Source:
    """Counts how often it was read; a read can be held, or fail."""

    def __init__(self):
        self.reads = 0
        self.error = None
        self.entered = threading.Semaphore(0)
        self.goes_on = threading.Event()
        self.goes_on.set()

    def __call__(self):
        self.reads += 1
        number = self.reads
        error = self.error
        self.entered.release()
        self.goes_on.wait(10)
        if error is not None:
            raise error
        return number


@pytest.fixture
def source():
    return Source()


@pytest.fixture
def threads():
    with ThreadPoolExecutor(20) as threads:
        yield threads


def wait_in_line(kept, key, read, threads, count=1):
    """Ask in threads of their own for what is being read; give them time to be waiting."""
    asking = [threads.submit(kept.get, key, read) for _ in range(count)]
    time.sleep(0.05)
    return asking


def test_an_answer_is_given_until_it_is_too_old(clock, source):
    kept = Cache("tests", 10, keep_for_s=1.0)

    assert kept.get("a", source) == 1
    clock.now += 0.99
    assert kept.get("a", source) == 1
    clock.now += 0.02
    assert kept.get("a", source) == 2


def test_an_age_counts_from_when_the_read_began(clock):
    kept = Cache("tests", 10, keep_for_s=1.0)

    def slow():
        clock.now += 0.8
        return "old"

    assert kept.get("a", slow) == "old"
    clock.now += 0.3
    assert kept.get("a", lambda: "new") == "new"


def test_an_answer_without_an_end_is_kept_and_none_is_one_too(source):
    kept = Cache("tests", 10)

    assert [kept.get("a", source) for _ in range(3)] == [1, 1, 1]
    assert kept.get("b", lambda: None) is None
    assert kept.get("b", source) is None


def test_the_key_that_was_asked_for_longest_ago_makes_room():
    kept = Cache("tests", 2)
    for key in ("a", "b", "a", "c"):
        kept.get(key, lambda key=key: f"first {key}")

    assert len(kept) == 2
    assert kept.get("a", lambda: "again") == "first a"
    assert kept.get("b", lambda: "again") == "again"


def test_all_who_ask_at_once_are_one_read(source, threads):
    kept = Cache("tests", 10, keep_for_s=60)
    source.goes_on.clear()

    asking = wait_in_line(kept, "a", source, threads, count=20)
    source.goes_on.set()

    assert {asked.result(5) for asked in asking} == {1}
    assert source.reads == 1


def test_one_key_does_not_wait_for_another(source, threads):
    kept = Cache("tests", 10)
    source.goes_on.clear()
    wait_in_line(kept, "a", source, threads)

    assert kept.get("b", lambda: "at once") == "at once"

    source.goes_on.set()


def test_an_error_of_a_read_is_not_remembered_and_the_next_one_tries(source, threads):
    kept = Cache("tests", 10)
    source.goes_on.clear()
    source.error = OSError("away")
    first = wait_in_line(kept, "a", source, threads)
    source.entered.acquire(timeout=5)
    source.error = None
    others = wait_in_line(kept, "a", source, threads, count=3)

    source.goes_on.set()

    with pytest.raises(OSError, match="away"):
        first[0].result(5)
    assert [other.result(5) for other in others] == [2, 2, 2]


def test_a_reader_that_has_waited_long_enough_reads_too(source, threads, monkeypatch):
    monkeypatch.setattr(cache, "PATIENCE_S", 0.2)
    kept = Cache("tests", 10)
    source.goes_on.clear()
    [hanging] = wait_in_line(kept, "a", source, threads)
    [patient] = wait_in_line(kept, "a", lambda: "by itself", threads)

    assert patient.result(5) == "by itself"
    assert kept.get("a", source) == "by itself"

    source.goes_on.set()
    assert hanging.result(5) == 1
    assert kept.get("a", source) == "by itself", "what came late is not news"


def test_an_old_value_is_read_anew_behind_the_back_of_those_who_ask(clock, source):
    refresher = Later()
    kept = Cache("tests", 10, keep_for_s=1.0, refresh_after_s=0.5, refresher=refresher)
    kept.get("a", source)
    clock.now += 0.6

    assert [kept.get("a", source) for _ in range(3)] == [1, 1, 1]
    assert len(refresher.given) == 1, "asked for once"

    refresher.do_all()
    clock.now += 0.4
    assert kept.get("a", source) == 2
    clock.now += 0.7
    assert kept.get("a", source) == 3, "nobody had asked for it to be refreshed"


def test_a_refresh_that_nobody_waited_for_is_left_out(clock, source):
    refresher = Later()
    kept = Cache("tests", 10, keep_for_s=1.0, refresh_after_s=0.5, refresher=refresher)
    kept.get("a", source)
    clock.now += 0.6
    kept.get("a", source)
    clock.now += 0.6
    assert kept.get("a", source) == 2, "the refresher is late: who asks does not wait for it"

    refresher.do_all()

    assert source.reads == 2


def test_a_refresh_that_fails_is_tried_again_and_then_who_asks_hears_of_it(clock, source):
    refresher = Later()
    kept = Cache("tests", 10, keep_for_s=1.0, refresh_after_s=0.3, refresher=refresher)
    kept.get("a", source)
    source.error = OSError("away")

    for _ in range(3):
        clock.now += 0.31
        assert kept.get("a", source) == 1
        refresher.do_all()
    assert source.reads == 4

    clock.now += 0.1
    with pytest.raises(OSError, match="away"):
        kept.get("a", source)


def test_while_it_is_refreshed_nobody_waits(source, threads):
    with ThreadPoolExecutor(1) as refresher:
        kept = Cache("tests", 10, keep_for_s=60, refresh_after_s=0.01, refresher=refresher)
        kept.get("a", source)
        time.sleep(0.02)
        source.goes_on.clear()

        assert [kept.get("a", source) for _ in range(100)] == [1] * 100

        source.goes_on.set()
        until(lambda: kept.get("a", source) > 1, within_s=60)


def test_a_forgotten_value_is_read_again(source):
    kept = Cache("tests", 10)
    kept.get("a", source)

    kept.forget("a")
    kept.forget("unknown")

    assert kept.get("a", source) == 2


def test_a_read_that_began_before_a_forget_is_not_remembered(source, threads):
    kept = Cache("tests", 10)
    source.goes_on.clear()
    [outdated] = wait_in_line(kept, "a", source, threads)

    kept.forget("a")

    assert kept.get("a", lambda: "changed") == "changed", "without waiting for the other"
    source.goes_on.set()
    assert outdated.result(5) == 1
    assert kept.get("a", source) == "changed"


def test_readers_that_waited_for_a_forgotten_read_see_the_change(source, threads):
    kept = Cache("tests", 10)
    source.goes_on.clear()
    wait_in_line(kept, "a", source, threads)
    others = wait_in_line(kept, "a", lambda: "changed", threads, count=5)

    kept.forget("a")

    assert [other.result(5) for other in others] == ["changed"] * 5
    source.goes_on.set()


def test_a_refresh_that_began_before_a_forget_is_not_remembered(clock):
    refresher = Later()
    kept = Cache("tests", 10, keep_for_s=1.0, refresh_after_s=0.5, refresher=refresher)
    kept.get("a", lambda: "first")
    clock.now += 0.6

    def outdated():
        kept.forget("a")
        return "outdated"

    assert kept.get("a", outdated) == "first"
    refresher.do_all()

    assert kept.get("a", lambda: "changed") == "changed"


def test_while_somebody_reads_others_take_what_is_a_little_too_old(clock, source, threads):
    kept = Cache("tests", 10, keep_for_s=1.0, stale_for_s=2.0)
    assert kept.get("a", source) == 1
    source.goes_on.clear()
    clock.now += 1.5
    first = threads.submit(kept.get, "a", source)
    source.entered.acquire()
    source.entered.acquire()

    assert kept.get("a", source) == 1
    clock.now += 2.0
    others = [threads.submit(kept.get, "a", source) for _ in range(3)]
    source.goes_on.set()

    assert first.result(10) == 2
    # that of the first began too long before they asked
    assert {each.result(10) for each in others} == {3}


def test_a_read_that_others_did_not_wait_for_is_remembered_all_the_same(
    clock, source, threads, monkeypatch
):
    monkeypatch.setattr(cache, "PATIENCE_S", 0.0)
    kept = Cache("tests", 10)
    held, source.goes_on = source.goes_on, threading.Event()
    reads = [threads.submit(kept.get, "a", source) for _ in range(3)]
    for _ in reads:
        source.entered.acquire()

    source.goes_on.set()
    held.set()

    assert sorted(read.result(10) for read in reads) == [1, 2, 3]
    assert kept.get("a", source) in (1, 2, 3)
    assert source.reads == 3
