"""What workers' rows say: who keeps failing, what nobody serves, how long a start waits."""

import pytest

from policy.fleet import Pool
from policy.workers import (
    CRASH_LOOP_AFTER,
    WorkerNow,
    WorkersInvalid,
    WorkerState,
    keeps_failing,
    pause_before_start_s,
    unheld,
    workers_by_class,
)
from tests.builders import a_fleet

POOLS = {name: Pool(models=("a",), slots=1, max_batch_rows=1) for name in ("local", "edit")}


def a_worker(state=WorkerState.READY, **facts) -> WorkerNow:
    return WorkerNow(**{"name": "gpu0@a", "pool": "a", "state": state, "is_silent": False} | facts)


@pytest.mark.parametrize(
    ("state", "failed_starts", "fails"),
    [
        (WorkerState.LOADING, 0, False),
        (WorkerState.LOADING, CRASH_LOOP_AFTER - 1, False),
        (WorkerState.LOADING, CRASH_LOOP_AFTER, True),
        (WorkerState.FAILED, 0, True),
        (WorkerState.READY, 0, False),
    ],
)
def test_worker_keeps_failing_when_start_after_start_did_not_get_ready(state, failed_starts, fails):
    assert keeps_failing(a_worker(state, failed_starts=failed_starts)) is fails


def test_worker_is_live_while_it_is_ready_or_leaves_and_is_heard_of():
    live = [state for state in WorkerState if a_worker(state).is_live]

    assert live == [WorkerState.READY, WorkerState.LEAVING]
    assert not a_worker(is_silent=True).is_live


def test_pauses_before_starts_grow_and_the_first_two_starts_have_none():
    pauses = [pause_before_start_s(failed) for failed in range(50)]

    assert pauses[:2] == [0, 0], "a worker that is killed while it loads is started again at once"
    assert pauses == sorted(pauses)
    assert pauses[-1] == 60


def test_version_is_unserved_where_it_failed_and_no_live_worker_of_the_pool_holds_it():
    failed = {"x@1": "it is broken", "y@1": "it is broken"}
    here = a_worker(held=["z@1"], failed=failed)
    there = a_worker(name="gpu1@a", held=["y@1", "z@1"], failed={"x@1": "it is broken"})
    silent = a_worker(name="gpu2@a", is_silent=True, held=["x@1"])

    assert unheld([here, there, silent]) == {"a": ["x@1"]}
    assert unheld([a_worker(held=["x@1"])]) == {"a": []}


def test_checkpoints_of_a_pool_are_all_versions_of_its_models():
    assert a_fleet().checkpoints_in("local") == {"pocket@1"}


@pytest.mark.parametrize(
    ("wish", "counts"),
    [
        ("1", {"local": 1, "edit": 1}),
        ("0", {"local": 0, "edit": 0}),
        ("3", {"local": 3, "edit": 3}),
        ("edit=2", {"local": 1, "edit": 2}),
        ("0,edit=2", {"local": 0, "edit": 2}),
        ("edit=0, local=2", {"local": 2, "edit": 0}),
    ],
)
def test_number_of_workers_is_of_each_pool_unless_a_pool_is_named(wish, counts):
    assert workers_by_class(wish, POOLS) == counts


@pytest.mark.parametrize(
    ("wish", "told"),
    [
        ("", "'' is no number of workers"),
        ("two", "accepted: 0 to 64 for every pool"),
        ("edit=-1", "'edit=-1' is no number"),
        ("65", "0 to 64"),
        ("large=2", "'large' is not a pool; accepted: local, edit"),
    ],
)
def test_number_of_workers_that_cannot_be_understood_is_refused_with_what_is_accepted(wish, told):
    with pytest.raises(WorkersInvalid, match=told):
        workers_by_class(wish, POOLS)
