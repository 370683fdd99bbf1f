"""What a worker keeps: leases that it can renew, snapshots while there is room, costs."""

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import OperationalError

import tasks.keeper
from models import leases
from models.database import transaction
from policy import connections
from tasks.checkpoints import Checkpoints
from tasks.keeper import LeaseKeeper, WorkerIdentity
from tests.builders import a_lease, hand_off, until
from tests.clocks import KeptClock
from tests.tasks.conftest import WorkerHere, a_worker, metric

STOP_S = 5.0
NAME = "cpu7@here"


@pytest.fixture
def here(fleet_here, settings_here, engine_here) -> Iterator[WorkerHere]:
    """A worker whose heartbeats come often."""
    settings = settings_here.model_copy(update={"lease_renew_s": 0.2})
    with a_worker(fleet_here, settings, engine_here) as worker:
        yield worker


@pytest.fixture
def clock(here, monkeypatch) -> KeptClock:
    """The clock of all keepers, whose watches look at it very often."""
    clock = KeptClock()
    assert tasks.keeper.RETRY_S <= 1, "how late it may notice what a test notices at once"
    monkeypatch.setattr(tasks.keeper, "RETRY_S", 0.02)
    monkeypatch.setattr(tasks.keeper, "time", clock)
    return clock


def until_watched(clock: KeptClock, keeper: LeaseKeeper) -> None:
    """Return when the keeper has decided what the time that it is now means for its work."""
    [watch] = [thread for thread in keeper._threads if thread.name == "watch"]
    # whoever looks again has drawn its conclusions from the look before
    until(lambda: clock.looks_of(watch) >= 2, within_s=60, what="two looks at the clock")


@contextmanager
def a_keeper(here, **times):
    identity = WorkerIdentity(name=NAME, pool="local", device="cpu", slots=16, facts={})
    keeper = LeaseKeeper(
        here.database,
        identity,
        ended=here.renderer.verdicts.ended,
        **{"ttl_s": 60, "renew_s": 0.05, "stop_s": STOP_S} | times,
    )
    keeper.start(max_attempts=5)
    try:
        yield keeper
    finally:
        keeper.close()


def test_keeper_tells_before_the_next_renewal_what_has_changed(here):
    query = text("SELECT fleet_revision FROM workers WHERE name = :name")

    def told() -> int | None:
        with transaction(here.database) as session:
            return session.scalar(query, {"name": NAME})

    with a_keeper(here, renew_s=3600) as keeper:
        keeper.revision = 7
        keeper.beat_soon()

        until(lambda: told() == 7, within_s=60, what="the row of the worker")


def test_what_several_threads_tell_of_a_worker_at_once_is_all_told(here):
    keeper = here.keeper
    before = keeper.identity

    def tell(name: str) -> None:
        for number in range(300):
            keeper.describe(facts={name: number, f"{name}-gone": None}, loaded=(name,))

    names = [f"fact-{number}" for number in range(4)]
    threads = [threading.Thread(target=tell, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert keeper.identity.facts == before.facts | dict.fromkeys(names, 299)
    assert keeper.identity.held == before.held
    keeper.describe(facts=dict.fromkeys(names), loaded=before.loaded)
    assert keeper.identity == before


@pytest.mark.parametrize("renewals", ["fail", "hang"])
def test_keeper_drops_its_work_by_itself_when_nothing_was_renewed_for_stop_s(
    here,
    monkeypatch,
    clock,
    renewals,
):
    job, renew, begun = here.accept(), leases.renew, []
    is_away, is_tried, goes_on = threading.Event(), threading.Event(), threading.Event()

    def renew_while_it_is_there(*arguments, worker, **options):
        if worker != NAME:
            return renew(*arguments, worker=worker, **options)
        begun.append(1)
        if not is_away.is_set():
            return renew(*arguments, worker=worker, **options)
        is_tried.set()
        if renewals == "hang":
            goes_on.wait(120)
        raise OperationalError("UPDATE jobs", {}, Exception("the server closed the connection"))

    monkeypatch.setattr(leases, "renew", renew_while_it_is_there)
    with a_keeper(here) as keeper, keeper.leased(job.id) as held:
        for _ in range(2):
            clock.go_on(0.6 * STOP_S)
            before = len(begun)
            # the first may have begun before the clock went on; the third, after the second ended
            until(lambda: len(begun) >= before + 3, within_s=60, what="a renewal")  # noqa: B023
        until_watched(clock, keeper)
        assert not held.is_lost, "as long as it is renewed"
        lost_before = metric("darkroom_leases_lost_total")

        is_away.set()
        until(is_tried.is_set, within_s=60, what="a renewal that does not come through")
        clock.go_on(STOP_S - 0.1)
        until_watched(clock, keeper)
        assert not held.is_lost, "not at the first that fails"
        clock.go_on(0.2)
        until(lambda: held.is_lost, within_s=60, what="the end of its work")
        goes_on.set()

    assert metric("darkroom_leases_lost_total") == lost_before + 1


def test_keeper_offers_no_slots_once_its_worker_has_to_go(here):
    def offered() -> int:
        with transaction(here.database) as session:
            return session.scalar(text("SELECT slots FROM workers WHERE name = 'cpu7@here'"))

    with a_keeper(here) as keeper:
        assert offered() == 16

        keeper.take_no_more("a test wants it")
        until(lambda: offered() == 0, what="a heartbeat without slots")

    assert offered() is None, "it signed off"


@pytest.mark.parametrize(("guidance", "rows"), [(4.0, 2), (1.0, 1)])
def test_keeper_learns_the_cost_of_every_row_that_an_image_takes(here, monkeypatch, guidance, rows):
    learnt, observe = [], tasks.keeper.learning.observe
    monkeypatch.setattr(
        tasks.keeper.learning,
        "observe",
        lambda session, seen: (learnt.append(dict(seen)), observe(session, seen)),
    )
    job = here.accept(guidance=guidance, num_steps=6)

    here.render(job).join(timeout=60)

    sums = until(lambda: [seen for seen in learnt if seen], what="a heartbeat that tells of it")[0]
    [(key, cost)] = sums.items()
    assert key == ("local", "pocket", 128, 128)
    assert (cost.images, cost.row_steps) == (1, 6 * rows)
    assert cost.denoise_s > 0
    assert cost.fixed_s > 0


def test_keeper_writes_at_the_next_heartbeat_what_a_failed_one_was_to_write(here, monkeypatch):
    learnt, failed = [], []

    def observe(session, seen):
        if seen and not failed:
            failed.append(dict(seen))
            raise OperationalError("INSERT", {}, Exception("the server closed the connection"))
        learnt.append(dict(seen))

    monkeypatch.setattr(tasks.keeper.learning, "observe", observe)
    key = ("local", "pocket", 128, 128)

    with a_keeper(here) as keeper:
        keeper.learn(key, row_steps=6, denoise_s=0.5, fixed_s=0.25)
        until(lambda: failed, what="the heartbeat that fails")
        keeper.learn(key, row_steps=4, denoise_s=0.25, fixed_s=0.25)
        until(lambda: sum(seen[key].images for seen in learnt if seen) == 2, what="both images")

    sums = [seen[key] for seen in learnt if seen]
    assert sum(one.row_steps for one in sums) == 10
    assert sum(one.denoise_s for one in sums) == 0.75
    assert sum(one.fixed_s for one in sums) == 0.5


@pytest.mark.parametrize(("fill", "is_kept"), [(0.6, True), (0.7, False)])
def test_snapshots_on_the_way_are_kept_only_where_the_hand_off_has_room(here, fill, is_kept):
    checkpoints = Checkpoints(here.engine, here.snapshots, here.renderer.signals, fill=lambda: fill)
    renderer = replace(here.renderer, checkpoints=checkpoints)
    worker = replace(here, parts=replace(here.parts, renderer=renderer))
    job = here.accept(tier="quality", num_steps=12)

    worker.render(job).join(timeout=60)
    checkpoints.close()

    assert here.row(job).state == "storing"
    assert bool(here.snapshots.of(job.id)) is is_kept


def test_job_that_fails_with_its_worker_started_again_is_told_of(here, ended_jobs):
    with transaction(here.database) as session:
        lease = a_lease(session, worker="cpu7@here", ttl_s=600)
        lease.job.counted_attempts = 4
    here.snapshots.put(lease.job_id, 0, 1, 2, b"of its predecessor")

    with a_keeper(here):
        until(lambda: lease.job_id in ended_jobs, within_s=60, what="the word of its end")

    assert here.row(lease.job).state == "failed"
    until(lambda: here.snapshots.of(lease.job_id) == {}, what="the end of its snapshot")


def test_time_without_renewal_is_counted_from_the_beginning_of_the_last_that_came_through(
    here,
    monkeypatch,
    clock,
):
    job, renew, begun = here.accept(), leases.renew, []
    slow_s, goes_on = 0.6 * STOP_S, threading.Event()

    def renew_slowly_and_then_hang(*arguments, worker, **options):
        if worker == NAME:
            begun.append(1)
            if len(begun) == 1:
                clock.go_on(slow_s)
            else:
                goes_on.wait(120)
        return renew(*arguments, worker=worker, **options)

    with a_keeper(here) as keeper, keeper.leased(job.id) as held:
        monkeypatch.setattr(leases, "renew", renew_slowly_and_then_hang)
        until(lambda: len(begun) == 2, within_s=60, what="a renewal that hangs")
        clock.go_on(STOP_S - slow_s - 0.1)
        until_watched(clock, keeper)
        assert not held.is_lost

        clock.go_on(0.2)
        until(lambda: held.is_lost, within_s=60, what="the end of its work")
        goes_on.set()


def test_lease_that_ended_with_its_last_hand_off_is_no_lost_one(here):
    job, before = here.accept(), metric("darkroom_leases_lost_total")

    with a_keeper(here) as keeper, keeper.leased(job.id) as held:
        with transaction(here.database) as session:
            hand_off(session, held.lease, 0)
        held.note_handed_on()
        beats = beats_of(here)
        until(lambda: beats_of(here) > beats, what="the next heartbeat")
        until(lambda: beats_of(here) > beats + 0.3, what="one that began after that")

        assert not held.is_lost
    assert metric("darkroom_leases_lost_total") == before


def beats_of(here) -> float:
    """When the worker of `a_keeper` was seen last."""
    with transaction(here.database) as session:
        query = "SELECT extract(epoch FROM seen_at)::float FROM workers WHERE name = 'cpu7@here'"
        return session.scalar(text(query))


def test_keeper_that_starts_puts_back_what_a_worker_of_its_name_held_and_nothing_else(here):
    with transaction(here.database) as session:
        own = a_lease(session, worker="cpu7@here", ttl_s=600).job
        other = a_lease(session, worker="cpu6@here", ttl_s=600).job

    with a_keeper(here):
        assert (here.row(own).state, here.row(own).counted_attempts) == ("queued", 1)
        assert here.row(other).state == "running"


def test_leases_are_renewed_while_tasks_hold_every_connection_of_their_own(here):
    job = here.accept()
    seen = text("SELECT lease_expires_at FROM jobs WHERE id = :id")

    with ExitStack() as held, create_engine(here.database.url).connect() as aside:
        held.enter_context(here.keeper.leased(job.id))
        for _ in range(2 * connections.WORKER):
            held.enter_context(here.database.connect())
        first = aside.scalar(seen, {"id": job.id})
        aside.rollback()

        def is_renewed() -> bool:
            expires_at = aside.scalar(seen, {"id": job.id})
            aside.rollback()
            return expires_at > first

        until(is_renewed, within_s=60, what="a renewal")
