"""The keys in use: looked up together and seldom, and never trusted for longer than that takes."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import event
from sqlalchemy.exc import OperationalError

from app.live import cache, keyring
from app.live.keyring import MOST_AT_ONCE, MOST_REMEMBERED, TRUSTED_FOR_S, Keyring
from models import api_keys, tenants
from models.database import make_engine, transaction
from tests.clocks import KeptClock

PEPPER = "a pepper of sixteen letters"


class RateResult(Keyring):
    """A keyring, and how many keys each of its look-ups was for."""

    def __init__(self, *parts) -> None:
        super().__init__(*parts)
        self.asked_for: list[int] = []

    def _read(self, kids):
        self.asked_for.append(len(kids))
        return super()._read(kids)


@pytest.fixture
def engine(stack):
    engine = make_engine(stack.env["DATABASE_URL"], pool_size=2)
    yield engine
    engine.dispose()


@pytest.fixture
def ring(engine):
    with ThreadPoolExecutor(1) as refresher:
        yield RateResult(engine, refresher)


@pytest.fixture
def kids(engine):
    """Twenty live keys of one tenant."""
    with transaction(engine) as session:
        tenant = tenants.create(session, name=f"app-keyring-{time.time_ns()}", actor="tests")
        return [
            api_keys.issue(
                session, tenant_id=tenant.id, name="tests", pepper=PEPPER, actor="tests"
            )[0].kid
            for _ in range(20)
        ]


def used_for(ring, kids, seconds: float) -> None:
    """All of them in turns."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for kid in kids:
            assert ring.find(kid).key.kid == kid
        time.sleep(0.05)


def test_keys_in_use_are_looked_up_all_at_once(ring, kids):
    used_for(ring, kids, 0.1)
    before = len(ring.asked_for)

    used_for(ring, kids, 2.0)

    since = ring.asked_for[before:]
    assert 1 <= len(since) <= 2.0 / 0.25 + 2
    assert set(since) == {20}


def test_keys_that_were_left_alone_for_a_while_are_looked_up_once_for_all_who_come_back(
    ring, kids, monkeypatch
):
    clock = KeptClock()  # no key grows old while the threads wait for their turn
    for module in (cache, keyring):
        monkeypatch.setattr(module, "time", clock)
    for kid in kids:
        ring.find(kid)
    before = len(ring.asked_for)
    clock.go_on(TRUSTED_FOR_S + 0.1)

    with ThreadPoolExecutor(20) as threads:
        list(threads.map(ring.find, kids))

    assert ring.asked_for[before:] == [20]


def test_while_one_look_up_hangs_the_others_see_for_themselves(ring, kids, engine, monkeypatch):
    monkeypatch.setattr(cache, "PATIENCE_S", 0.2)
    used_for(ring, kids, 0.1)
    time.sleep(TRUSTED_FOR_S + 0.1)
    hangs, entered = threading.Event(), threading.Event()

    @event.listens_for(engine, "before_cursor_execute")
    def hang(*given) -> None:
        if not entered.is_set():
            entered.set()
            hangs.wait(10)

    with ThreadPoolExecutor(2) as threads:
        first = threads.submit(ring.find, kids[0])
        entered.wait(10)
        second = threads.submit(ring.find, kids[1])
        assert second.result(5).key.kid == kids[1]
        assert not first.done()
        hangs.set()
        assert first.result(5).key.kid == kids[0]


def test_unknown_keys_are_remembered_as_such_and_not_without_end(ring):
    assert ring.find("unknownkid00") is None
    assert ring.find("unknownkid00") is None
    assert ring.asked_for == [1]
    assert MOST_REMEMBERED <= 10_000


def test_made_up_keys_drive_none_of_those_in_use_out(ring, kids):
    used_for(ring, kids, 0.1)
    for number in range(MOST_AT_ONCE + 1):
        assert ring.find(f"madeup{number:04}x") is None

    assert set(kids) <= set(ring._used_at)


def test_a_key_in_use_is_taken_for_live_while_the_database_cannot_be_read(ring, kids, monkeypatch):
    """A stream or a wait goes on then, though it began with a key that may be revoked meanwhile."""
    assert ring.is_live(kids[0])
    assert not ring.is_live("unknownkid00")

    def away(kid):
        raise OperationalError("SELECT", {}, Exception("away"))

    monkeypatch.setattr(ring, "find", away)

    assert ring.is_live(kids[0])
