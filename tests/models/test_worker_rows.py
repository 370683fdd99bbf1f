"""Who is alive: the rows that workers refresh, and the slots that add up."""

import uuid

import pytest
from sqlalchemy import text

from models import revisions, workers
from models.workers import NewWorker
from policy.workers import WorkerState
from tests.builders import a_job


@pytest.fixture
def pool() -> str:
    return f"pool-{uuid.uuid4().hex[:8]}"


def beat(session, pool, name="gpu0", slots=16):
    workers.heartbeat(
        session, name=f"{name}@{pool}", pool=pool, device="cpu", slots=slots, facts={}
    )


def silence(session, pool, seconds):
    session.execute(
        text(
            "UPDATE workers SET seen_at = clock_timestamp() - make_interval(secs => :s) "
            "WHERE pool = :pool"
        ),
        {"s": seconds, "pool": pool},
    )


def test_the_slots_of_live_workers_add_up(session, pool):
    beat(session, pool, "gpu0", slots=16)
    beat(session, pool, "gpu1", slots=8)
    beat(session, pool, "gpu1", slots=8)

    assert workers.capacity(session, pool=pool, silent_for_s=15)[:2] == (24, 2)


def test_a_worker_that_leaves_takes_no_jobs_any_more(session, pool):
    beat(session, pool, "gpu0", slots=16)
    beat(session, pool, "gpu1", slots=0)

    assert workers.capacity(session, pool=pool, silent_for_s=15)[:2] == (16, 1)


def test_a_silent_worker_does_not_count_until_it_speaks_again(session, pool):
    beat(session, pool)
    silence(session, pool, 20)
    assert workers.capacity(session, pool=pool, silent_for_s=15)[:2] == (0, 0)

    beat(session, pool)

    assert workers.capacity(session, pool=pool, silent_for_s=15)[:2] == (16, 1)


def test_a_worker_that_leaves_is_gone_and_one_that_died_is_forgotten(session, pool):
    beat(session, pool, "gpu0")
    beat(session, pool, "gpu1")
    workers.leave(session, f"gpu0@{pool}")
    assert [
        worker.name for worker in workers.live(session, silent_for_s=15) if worker.pool == pool
    ] == [f"gpu1@{pool}"]

    silence(session, pool, 7200)
    workers.forget_the_silent(session, silent_for_s=3600)

    assert (
        session.scalar(text("SELECT count(*) FROM workers WHERE pool = :pool"), {"pool": pool}) == 0
    )


def test_a_worker_is_counted_as_live_for_as_long_as_it_said(session, pool):
    a_job(session, pool=pool)
    for name, silent_after_s in (("patient", 60.0), ("hasty", 5.0)):
        workers.heartbeat(
            session,
            name=f"{name}@{pool}",
            pool=pool,
            device="cpu",
            slots=1,
            facts={},
            silent_after_s=silent_after_s,
        )
    silence(session, pool, 20)

    assert (
        session.scalar(
            text("SELECT live_workers FROM queue_now WHERE pool = :pool"), {"pool": pool}
        )
        == 1
    )


def a_start(pool, name="gpu0") -> NewWorker:
    return NewWorker(
        name=f"{name}@{pool}",
        pool=pool,
        device="cpu",
        instance=uuid.uuid4(),
        host="here",
        pid=42,
        process="boot:42:1",
    )


def claim(session, new, **options):
    return workers.claim(session, new, silent_after_s=15, **options)


def say(session, new, **options):
    shape = {"device": new.device, "slots": 16, "facts": {}, "instance": new.instance}
    return workers.heartbeat(session, name=new.name, pool=new.pool, **shape | options)


def row_of(session, new):
    query = text("SELECT * FROM workers_now WHERE worker = :name")
    return session.execute(query, {"name": new.name}).one_or_none()


def test_worker_that_loads_has_its_name_and_counts_for_nothing(session, pool):
    new = a_start(pool)

    holder = claim(session, new)

    assert holder.instance == new.instance
    assert row_of(session, new).state == "loading"
    assert workers.capacity(session, pool=pool, silent_for_s=15)[:2] == (0, 0)
    assert not [one for one in workers.live(session, silent_for_s=15) if one.pool == pool]


def test_name_of_a_live_worker_is_given_to_no_other(session, pool):
    first, second = a_start(pool), a_start(pool)
    claim(session, first)

    for state in (WorkerState.LOADING, WorkerState.READY, WorkerState.LEAVING):
        say(session, first, state=state)
        assert claim(session, second).instance == first.instance, state

    assert claim(session, first).instance == first.instance, "its own it may have again"


@pytest.mark.parametrize("end", ["signed off", "silent", "failed", "gone"])
def test_name_is_free_once_its_holder_is_known_to_have_ended(session, pool, end):
    first, second = a_start(pool), a_start(pool)
    claim(session, first)
    if end == "signed off":
        workers.leave(session, first.name, first.instance)
    elif end == "silent":
        silence(session, pool, 20)
    elif end == "failed":
        workers.fail(session, first.name, first.instance, "there is nothing to load")

    holder = claim(session, second, gone=first.instance if end == "gone" else None)

    assert holder.instance == second.instance


def test_process_that_lost_its_name_writes_and_removes_nothing(session, pool):
    first, second = a_start(pool), a_start(pool)
    claim(session, first)
    claim(session, second, gone=first.instance)
    say(session, second, slots=8)

    assert not say(session, first, slots=16)
    workers.fail(session, first.name, first.instance, "it is not its own")
    workers.leave(session, first.name, first.instance)

    assert (row_of(session, second).slots, row_of(session, second).problem) == (8, None)


def test_starts_that_do_not_get_ready_are_counted_until_one_does(session, pool):
    counted = []
    gone = None
    for gets_ready in (False, False, True, False, False):
        new = a_start(pool)
        counted.append(claim(session, new, gone=gone).failed_starts)
        if gets_ready:
            say(session, new)
        gone = new.instance

    assert counted == [0, 1, 2, 0, 1]
    assert row_of(session, new).restarts == 4


def test_pool_s_capacity_tells_what_one_of_its_live_workers_serves(session, pool):
    def held():
        return workers.capacity(session, pool=pool, silent_for_s=15).held

    first, second, loading = a_start(pool), a_start(pool, "gpu1"), a_start(pool, "gpu2")
    for new in (first, second, loading):
        claim(session, new)
    assert held() is None, "nobody is live"

    say(session, first, held=["a@1"], failed={"b@1": "model b is broken"})
    say(session, second, held=["a@1", "c@1"], failed={"b@1": "model b is broken"})
    assert held() == {"a@1", "c@1"}
    assert row_of(session, first).failed_models == "b@1"
    assert row_of(session, first).problem == "model b is broken"

    say(session, second, held=None)
    assert held() is None, "a worker of the previous version serves all"


def test_checkpoints_are_loaded_where_a_live_worker_has_them_in_memory(session, pool):
    first, second, silent = (a_start(pool, name) for name in ("gpu0", "gpu1", "gpu2"))
    names = [f"{model}-{pool}@1" for model in "abc"]
    for new in (first, second, silent):
        claim(session, new)

    say(session, silent, held=names, loaded=names[2:])
    silence(session, pool, 60)
    say(session, first, held=names, loaded=names[:1])
    say(session, second, held=names[:2])

    loaded = workers.loaded_checkpoints(session, silent_for_s=15)
    assert {name for name in names if name in loaded} == set(names[:2])


def test_worker_that_can_load_nothing_is_remembered_for_a_day(session, pool):
    new = a_start(pool)
    claim(session, new)
    workers.fail(session, new.name, new.instance, "there is nothing to load")

    silence(session, pool, 7200)
    workers.forget_the_silent(session, silent_for_s=3600)
    assert row_of(session, new).state == "failed"

    silence(session, pool, 90_000)
    workers.forget_the_silent(session, silent_for_s=3600)
    assert row_of(session, new) is None


def a_revision(session) -> int:
    revision, _ = revisions.apply(session, f"# {uuid.uuid4()}", actor="tests")
    return revision.number


def turn_of_another(session, pool):
    """What a worker is told that is ready and has to start anew."""
    beat(session, pool, "other")
    return workers.leave_in_turn(session, f"other@{pool}", pool)


def test_worker_that_starts_anew_waits_for_one_that_leaves_and_while_that_loads(session, pool):
    number = a_revision(session)
    first = a_start(pool)
    say(session, first)

    assert workers.leave_in_turn(session, first.name, pool) is None
    assert turn_of_another(session, pool) == (first.name, "leaving")
    workers.leave_for_a_moment(session, first.name, first.instance, revision=number)
    assert turn_of_another(session, pool) == (first.name, "leaving")
    again = a_start(pool)
    claim(session, again, gone=first.instance)
    assert turn_of_another(session, pool) == (first.name, "loading")
    say(session, again)
    assert turn_of_another(session, pool) is None


def test_worker_that_cannot_come_back_keeps_the_others_until_there_is_another_revision(
    session, pool
):
    first = a_start(pool)
    say(session, first)
    workers.leave_for_a_moment(session, first.name, first.instance, revision=a_revision(session))
    again = a_start(pool)
    claim(session, again, gone=first.instance)
    say(session, again, state=WorkerState.LOADING)
    workers.fail(session, again.name, again.instance, "there is nothing to load")

    assert turn_of_another(session, pool) == (first.name, "failed")
    a_revision(session)
    assert turn_of_another(session, pool) is None


def test_worker_that_fails_for_reasons_of_its_own_keeps_nobody_waiting(session, pool):
    a_revision(session)
    broken = a_start(pool)
    claim(session, broken)
    workers.fail(session, broken.name, broken.instance, "its disk is gone")

    assert turn_of_another(session, pool) is None
