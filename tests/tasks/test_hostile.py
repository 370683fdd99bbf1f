"""What a worker decides when its device, its surroundings or a request itself is hostile: that job
alone suffers.
"""

import time
from contextlib import ExitStack

import numpy as np
import pytest
import redis
import torch
from sqlalchemy import text
from sqlalchemy.exc import OperationalError

import tasks.health
import tasks.verdicts
from edges.broker import job_of_message
from edges.notices import FakeNotices, Notice, NoticeWatch
from edges.progress import Step
from engine.engine import Engine
from engine.errors import EngineDied, EngineStopped
from models import leases
from models.database import transaction
from settings import REPO
from tasks.engines import checkpoint_specs, engine_config
from tasks.preemption import Preemption
from tests.builders import a_fleet, a_job, a_lease, hand_off, until
from tests.tasks.conftest import a_worker, left_at_its_first_checkpoint, metric

QUALITY = {"tier": "quality", "determinism": "reproducible", "bucket_rows": 2, "guidance": 1.0}
ENDLESS = {**QUALITY, "num_steps": 1000}  # something else ends it


@pytest.fixture
def breaks_the_device(here, monkeypatch):
    """The forward, or what comes of it, goes wrong wherever an image of this job takes part."""
    predict, decode = here.engine._runner.predict, here.engine._runner.decode

    def of_job(image, job):
        return image.request.group == str(job.id)

    def breaks(job, how):
        if how == "out of memory":

            def predict_or_fail(batch):
                if any(of_job(image, job) for image in batch):
                    raise torch.OutOfMemoryError("CUDA out of memory")
                return predict(batch)

            monkeypatch.setattr(here.engine._runner, "predict", predict_or_fail)
        else:

            def decode_nan(image):
                if of_job(image, job):
                    image.tensors.latents = torch.full_like(image.tensors.latents, torch.nan)
                return decode(image)

            monkeypatch.setattr(here.engine._runner, "decode", decode_nan)

    return breaks


def ended(here, *jobs):
    for thread in [here.render(job) for job in jobs]:
        thread.join(timeout=60)
        assert not thread.is_alive()
    return [here.row(job) for job in jobs]


def outcomes(here, job):
    with transaction(here.database) as session:
        query = text("SELECT outcome FROM attempts WHERE job_id = :id ORDER BY attempt")
        return list(session.scalars(query, {"id": job.id}))


def steps_of(here, job):
    held = next((held for held in here.keeper.all_held() if held.lease.job_id == job.id), None)
    expected = held.expected_s() if held else None
    return here.renderer.signals.steps(job.id) if expected is not None else []


def test_an_image_that_does_not_fit_is_tried_again_then_alone_and_fails_without_others(
    here, breaks_the_device
):
    large, neighbour = here.accept(), here.accept(num_steps=12)
    breaks_the_device(large, "out of memory")

    first, beside = ended(here, large, neighbour)
    assert (first.state, first.counted_attempts) == ("queued", 1)
    assert beside.state == "storing"

    (second,) = ended(here, large)
    (third,) = ended(here, large)

    assert (second.state, second.counted_attempts) == ("queued", 2)
    assert (third.state, third.failure_code) == ("failed", "out_of_memory")
    assert outcomes(here, large) == ["error", "error", "failed"]


def test_latents_that_are_not_numbers_fail_their_job_at_once_and_no_other(here, breaks_the_device):
    ill, neighbour = here.accept(), here.accept()
    breaks_the_device(ill, "nan")

    failed, beside = ended(here, ill, neighbour)

    assert (failed.state, failed.failure_code, failed.attempt) == ("failed", "not_finite", 1)
    assert beside.state == "storing"


def test_a_job_that_was_there_when_its_worker_died_twice_runs_alone(here, brake):
    suspect, other = here.accept(num_steps=5), here.accept(num_steps=5)
    with transaction(here.database) as session:
        session.execute(
            text("UPDATE jobs SET counted_attempts = 2 WHERE id = :id"), {"id": suspect.id}
        )

    brake.stop_after(1)
    first = here.render(other)
    until(lambda: steps_of(here, other), what="the other's first step")
    second = here.render(suspect)
    until(lambda: here.keeper.is_reserved(), what="the worker to be reserved")
    brake.release()
    for thread in (first, second):
        thread.join(timeout=60)

    with transaction(here.database) as session:
        query = text("SELECT max_images, steps FROM attempts WHERE job_id = :id")
        alone = session.execute(query, {"id": suspect.id}).one()
        shared = session.execute(
            text("SELECT shared_steps FROM attempts WHERE job_id = :id"), {"id": suspect.id}
        ).scalar_one()
    assert (alone.max_images, alone.steps, shared) == (1, 5, 0)
    assert not here.keeper.is_reserved()


def test_a_job_that_comes_where_another_wants_to_be_alone_is_given_back_uncounted(here, brake):
    suspect, another, plain = here.accept(), here.accept(), here.accept()
    with transaction(here.database) as session:
        ids = {"ids": [suspect.id, another.id]}
        session.execute(text("UPDATE jobs SET counted_attempts = 2 WHERE id = ANY(:ids)"), ids)
    brake.stop_after(1)
    first = here.render(suspect)
    until(lambda: steps_of(here, suspect), what="a step")

    rows = ended(here, another, plain)
    brake.release()
    first.join(timeout=60)

    assert [(row.state, row.counted_attempts) for row in rows] == [("queued", 2), ("queued", 0)]
    assert (outcomes(here, another), outcomes(here, plain)) == (["returned"], ["returned"])
    assert here.row(suspect).state == "storing"


def test_a_worker_whose_jobs_all_fail_unplanned_leaves_before_it_has_failed_the_backlog(
    here, monkeypatch
):
    jobs = [here.accept() for _ in range(4)]
    monkeypatch.setattr(here.engine._runner, "predict", lambda batch: 1 / 0)

    rows = [ended(here, job)[0] for job in jobs]

    assert [row.counted_attempts for row in rows] == [1, 1, 0, 0]
    assert {row.state for row in rows} == {"queued"}
    notice = here.notices.poll()
    assert (notice.within_s, notice.detail) == (5.0, "3 jobs in a row failed unplanned")


def test_an_error_now_and_then_is_no_reason_to_leave(here, monkeypatch):
    predict = here.engine._runner.predict
    for _ in range(3):
        monkeypatch.setattr(here.engine._runner, "predict", lambda batch: 1 / 0)
        ended(here, here.accept())
        monkeypatch.setattr(here.engine._runner, "predict", predict)
        ended(here, here.accept())

    assert here.notices.poll() is None


def test_a_job_that_breaks_the_device_thread_is_counted_and_its_worker_leaves(
    settings_here, monkeypatch
):
    small = {"sizes": ["128x128"], "tiers.quality.bucket_rows": {"128x128": 2}}
    changes = {f"models.pocket.{key}": value for key, value in small.items()}
    fleet = a_fleet(changes | {"pools.local.max_batch_rows": 2})  # which is soon warm
    pool = fleet.pools["local"]
    with (
        Engine(
            engine_config(settings_here, fleet, pool), checkpoint_specs(fleet, pool.models, REPO)
        ) as engine,
        a_worker(fleet, settings_here, engine, name="cpu1@here") as worker,
    ):
        monkeypatch.setattr(engine._ledger, "enter_forward", lambda batch, watch: 1 / 0)
        job = worker.accept()

        (row,) = ended(worker, job)

        assert (row.state, row.counted_attempts) == ("queued", 1)
        assert "the engine died" in worker.notices.poll().detail


def test_a_job_taken_while_the_worker_was_told_to_go_is_given_up_at_once(here):
    job = here.accept()
    take = here.keeper.leased

    here.keeper.take_no_more("told meanwhile")
    with take(job.id) as held:
        assert held.leaving == "told meanwhile"


def test_a_lost_answer_to_a_commit_bills_an_image_once(here):
    job = here.accept(num_images=2)
    with here.keeper.leased(job.id) as held, transaction(here.database) as session:
        for _ in range(2):
            hand_off(session, held.lease, 0)

    with transaction(here.database) as session:
        images = text("SELECT device_seconds FROM images WHERE index = 0 AND job_id = :id")
        attempts = text("SELECT device_seconds FROM attempts WHERE job_id = :id")
        assert [session.scalar(query, {"id": job.id}) for query in (images, attempts)] == [0.5, 0.5]


def test_a_full_hand_off_gives_the_job_back_without_counting_a_try(
    here, handoff_redis, monkeypatch
):
    monkeypatch.setattr(tasks.verdicts, "PIXELS_PATIENCE_S", (0.1,))
    job = here.accept()
    handoff_redis.config_set("maxmemory", "1")

    (row,) = ended(here, job)

    assert (row.state, row.counted_attempts) == ("queued", 0)
    assert outcomes(here, job) == ["returned"]
    handoff_redis.config_set("maxmemory", "1gb")
    (row,) = ended(here, job)
    assert row.state == "storing"


def test_pixels_wait_for_a_full_hand_off_for_some_seconds_and_are_not_rendered_again(
    here, handoff_redis, monkeypatch
):
    monkeypatch.setattr(tasks.verdicts, "PATIENCE_S", (0.1,))
    put, tries = here.renderer.handoff.put, []
    monkeypatch.setattr(
        here.renderer.handoff, "put", lambda *given: (tries.append(1), put(*given))[1]
    )
    job = here.accept()
    handoff_redis.config_set("maxmemory", "1")
    thread = here.render(job)

    until(lambda: len(tries) > 2, what="more tries than any other write would have")
    handoff_redis.config_set("maxmemory", "1gb")
    thread.join(timeout=60)

    assert (here.row(job).state, outcomes(here, job)) == ("storing", ["rendered"])


def test_a_worker_that_has_to_go_gives_its_jobs_up_even_where_no_snapshot_can_be_kept(
    here, handoff_redis
):
    job = here.accept(**ENDLESS)
    thread = here.render(job)
    until(lambda: steps_of(here, job), what="a step")
    handoff_redis.config_set("maxmemory", "1")
    notices, gone = FakeNotices(), []
    watch = NoticeWatch(
        [notices],
        Preemption(
            here.keeper,
            when_empty=lambda: gone.append(time.monotonic()),
            end_within=lambda within_s: None,
        ).begin,
    )

    notices.announce(0.2)
    until(lambda: gone, within_s=60, what="the worker's leave")
    thread.join(timeout=60)
    watch.close()

    row = here.row(job)
    assert (row.state, row.counted_attempts, outcomes(here, job)) == ("queued", 0, ["preempted"])
    with transaction(here.database) as session:
        query = text(
            "SELECT waste_class, device_seconds, snapshot_bytes FROM attempts WHERE job_id = :id"
        )
        attempt = session.execute(query, {"id": job.id}).one()
    assert (attempt.waste_class, attempt.snapshot_bytes) == ("preempted", 0)
    assert attempt.device_seconds > 0


@pytest.mark.parametrize("notices_s", [(0.4, 600.0), (600.0, 0.4)])
def test_worker_leaves_by_the_earlier_of_its_notices(here, notices_s):
    job = here.accept(**ENDLESS)
    thread = here.render(job)
    until(lambda: steps_of(here, job), what="a step")

    for within_s in notices_s:
        here.parts.preemption.begin(Notice("tests", within_s, "a test wants it"))
    thread.join(timeout=60)

    assert outcomes(here, job) == ["preempted"]


def test_a_job_that_overruns_its_deadline_is_stopped_by_its_engine_and_says_so(here, monkeypatch):
    forwards, predict = [], here.engine._runner.predict
    monkeypatch.setattr(
        here.engine._runner, "predict", lambda batch: (forwards.append(1), predict(batch))[1]
    )
    job = here.accept(**ENDLESS)
    with transaction(here.database) as session:
        session.execute(text("UPDATE jobs SET run_within_s = 0.3 WHERE id = :id"), {"id": job.id})

    (row,) = ended(here, job)

    assert (row.state, row.failure_code) == ("failed", "run_deadline")
    assert len(forwards) < ENDLESS["num_steps"]


def test_a_cancel_stops_the_image_at_its_next_step_and_touches_no_other_job(here, brake):
    job, other = (here.accept(**QUALITY, num_steps=8) for _ in range(2))
    brake.stop_after(1)
    threads = [here.render(job)]
    until(lambda: steps_of(here, job), what="a step")
    threads.append(here.render(other))
    until(lambda: len(here.keeper.all_held()) == 2, what="the other's lease")

    errors_before = metric("darkroom_render_errors_total", kind="ImageCanceled")
    here.keeper.drop(job.id)
    brake.release()
    threads[0].join(timeout=60)
    nothing_written = ("running", ["running"])
    assert (here.row(job).state, outcomes(here, job)) == nothing_written
    assert metric("darkroom_render_errors_total", kind="ImageCanceled") == errors_before
    threads[1].join(timeout=60)
    here.renderer.progress.flush(within_s=60)
    at_step = {step.step for step in here.renderer.signals.steps(job.id)}

    assert max(at_step) < 8, "though the other one, which began later, has come to its end"
    assert here.row(other).state == "storing"


def test_image_that_was_canceled_is_no_error_of_its_job(here):
    job = here.accept(**ENDLESS)
    thread = here.render(job)
    until(lambda: steps_of(here, job), what="a step")

    here.engine.cancel(f"{job.id}/1/0")
    thread.join(timeout=60)

    assert (here.row(job).counted_attempts, outcomes(here, job)) == (0, ["running"])


def test_worker_does_not_wait_for_a_full_hand_off_with_pixels_of_a_lost_job(here, handoff_redis):
    job = here.accept()
    handoff_redis.config_set("maxmemory", "1")
    thread = here.render(job)
    held = until(lambda: next(iter(here.keeper.all_held()), None), what="the lease")
    until(lambda: held.expected_s() == 0.0, what="the end of its image")

    here.keeper.drop(job.id)
    thread.join(timeout=20)  # it would wait for 27 s otherwise

    assert not thread.is_alive()


def test_images_that_finish_while_they_are_withdrawn_are_handed_on(here, brake, monkeypatch):
    job = here.accept(num_images=2, tier="quality", num_steps=3)
    checkpoints, withdraw = here.renderer.checkpoints, here.renderer.checkpoints.withdraw

    def withdraw_late(lease, handles):
        brake.release()
        for handle in handles.values():
            handle.result(60)
        return withdraw(lease, handles)

    monkeypatch.setattr(checkpoints, "withdraw", withdraw_late)
    brake.stop_after(0)
    thread = here.render(job)
    held = until(lambda: next(iter(here.keeper.all_held()), None), what="the lease")
    held.leave("a test wants it")
    thread.join(timeout=60)

    assert (here.row(job).state, outcomes(here, job)) == ("storing", ["rendered"])


def test_pixels_that_vanish_while_the_rest_is_rendered_send_the_job_back_at_once(here, brake):
    with transaction(here.database) as session:
        job = a_job(session, num_images=2)
        hand_off(session, a_lease(session, job, ttl_s=-1), 0)
        leases.lose(session, job.id, max_attempts=5)
    brake.stop_after(1)
    thread = here.render(job)
    until(lambda: steps_of(here, job), what="a step")

    with transaction(here.database) as session:
        leases.lose_hand_off(session, job.id, [0], attempt_of={0: 1})
    brake.release()
    thread.join(timeout=60)

    assert (here.row(job).state, outcomes(here, job)) == ("queued", ["lease_lost", "returned"])


def test_device_time_of_an_image_is_on_record_once(here):
    rendered, preempted = here.accept(num_images=2), here.accept(num_images=2, **ENDLESS)
    ended(here, rendered)
    thread = here.render(preempted)
    until(lambda: steps_of(here, preempted), what="a step")
    next(iter(here.keeper.all_held())).leave("a test wants it")
    thread.join(timeout=60)

    with transaction(here.database) as session:
        for job in (rendered, preempted):
            images = text("SELECT sum(device_seconds) FROM images WHERE job_id = :id")
            attempts = text("SELECT sum(device_seconds) FROM attempts WHERE job_id = :id")
            sums = [session.scalar(query, {"id": job.id}) for query in (images, attempts)]
            assert sums[0] == pytest.approx(sums[1])
            assert sums[0] > 0


def test_every_image_of_a_job_has_a_seed_of_its_own(here):
    plain = {**QUALITY, "num_steps": 3}
    pair, second = here.accept(num_images=2, seed=5, **plain), here.accept(seed=6, **plain)

    ended(here, pair)
    ended(here, second)

    pixels = [here.renderer.handoff.get(pair.id, index, 1).sha256 for index in range(2)]
    assert pixels[1] == here.renderer.handoff.get(second.id, 0, 1).sha256
    assert pixels[0] != pixels[1]


def test_a_wall_clock_that_is_a_day_off_changes_nothing_about_leases(here, brake, monkeypatch):
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 86_400)
    job = here.accept()

    def expiry():
        """When the lease ends, and how many seconds are left until then."""
        query = "SELECT lease_expires_at, extract(epoch FROM lease_expires_at - clock_timestamp())"
        with transaction(here.database) as session:
            return session.execute(text(f"{query} FROM jobs WHERE id = :id"), {"id": job.id}).one()

    brake.stop_after(0)
    thread = here.render(job)
    until(lambda: here.keeper.all_held(), what="the lease")
    taken_until, _ = expiry()
    until(lambda: expiry()[0] > taken_until, within_s=60, what="a renewal")
    _, left_s = expiry()
    brake.release()
    thread.join(timeout=60)

    assert 0 < left_s <= here.settings.lease_ttl_s
    assert here.row(job).state == "storing"


def test_a_damaged_snapshot_costs_its_steps_and_not_the_image(here):
    job = here.accept(**QUALITY, num_steps=6)
    with transaction(here.database) as session:
        session.execute(text("UPDATE jobs SET attempt = 1 WHERE id = :id"), {"id": job.id})
    here.snapshots.put(job.id, 0, 1, 5, b"not a snapshot")

    (row,) = ended(here, job)

    assert row.state == "storing"
    with transaction(here.database) as session:
        query = text("SELECT steps, resumed_steps FROM attempts WHERE job_id = :id AND attempt = 2")
        assert tuple(session.execute(query, {"id": job.id}).one()) == (6, 0)


def test_steps_that_are_done_again_are_on_record_also_when_the_hand_off_has_lost_everything(
    here, brake, handoff_redis
):
    job = here.accept(**QUALITY, num_steps=8)
    left_at_its_first_checkpoint(here, brake, job)
    with transaction(here.database) as session:
        left = session.scalar(
            text("SELECT reached_step FROM images WHERE job_id = :id"), {"id": job.id}
        )

    handoff_redis.flushall()
    (row,) = ended(here, job)

    assert row.state == "storing"
    with transaction(here.database) as session:
        query = text(
            "SELECT resumed_steps, lost_steps, lost_cause FROM attempts WHERE job_id = :id "
            "AND attempt = 2"
        )
        assert tuple(session.execute(query, {"id": job.id}).one()) == (0, left, "preempted")
    assert left > 0


def test_how_far_a_running_image_has_come_is_in_its_row_with_every_heartbeat(here):
    job = here.accept(**ENDLESS)
    thread = here.render(job)

    def reached() -> int:
        with transaction(here.database) as session:
            return session.scalar(
                text("SELECT reached_step FROM images WHERE job_id = :id"), {"id": job.id}
            )

    until(lambda: here.keeper._beat() or reached() > 1, within_s=30, what="a second step")
    here.keeper.drop(job.id)
    thread.join(timeout=60)


def test_a_resumed_image_has_the_bits_it_would_have_had(here, brake):
    whole, parted = (here.accept(**QUALITY, num_steps=6, seed=5) for _ in range(2))
    ended(here, whole)
    left_at_its_first_checkpoint(here, brake, parted)

    (row,) = ended(here, parted)

    assert (row.state, outcomes(here, parted)) == ("storing", ["preempted", "rendered"])
    pixels = [
        here.renderer.handoff.get(job.id, 0, here.row(job).attempt) for job in (whole, parted)
    ]
    assert np.array_equal(pixels[0].array, pixels[1].array)


def test_a_leaving_worker_passes_on_what_the_broker_still_hands_it(here):
    job = here.accept()
    here.keeper.take_no_more("a test wants it")

    (row,) = ended(here, job)

    assert (row.state, row.attempt) == ("queued", 0)
    assert row.announced_at is not None
    with redis.Redis.from_url(here.settings.broker_url) as client:
        assert job.id in {job_of_message(raw) for raw in client.lrange("local.fast", 0, -1)}


def test_a_job_back_on_the_same_worker_is_not_forgotten_when_its_old_attempt_ends(
    here,
):
    """Its lease was lost while the worker stood still.

    The old task is still about to notice when the new one has begun.
    """
    job = here.accept()
    with ExitStack() as first, ExitStack() as second:
        first.enter_context(here.keeper.leased(job.id))
        with transaction(here.database) as session:
            session.execute(
                text("UPDATE jobs SET lease_expires_at = clock_timestamp() WHERE id = :id"),
                {"id": job.id},
            )
            leases.lose(session, job.id, max_attempts=5)
        again = second.enter_context(here.keeper.leased(job.id))

        first.close()

        assert here.keeper.all_held() == [again]


def test_one_job_that_fails_again_and_again_is_not_its_worker_s_fault(here, monkeypatch):
    job = here.accept()
    monkeypatch.setattr(here.engine._runner, "predict", lambda batch: 1 / 0)

    counted = [ended(here, job)[0].counted_attempts for _ in range(tasks.health.STRIKES + 1)]

    assert counted == [1, 2, 3, 4]
    assert here.notices.poll() is None


@pytest.mark.parametrize(
    ("sampler", "write", "state"),
    [("nobody's", "fail", "failed"), ("ddim", "count_error", "queued")],
)
def test_verdict_waits_for_a_database_that_is_away_for_a_moment(
    here,
    monkeypatch,
    sampler,
    write,
    state,
):
    job, decide, tried = here.accept(sampler=sampler), getattr(leases, write), []
    monkeypatch.setattr(tasks.verdicts, "PATIENCE_S", (0.1, 0.1))
    monkeypatch.setattr(here.engine._runner, "predict", lambda batch: 1 / 0)

    def decide_at_the_third_try(*arguments, **options):
        tried.append(1)
        if len(tried) < 3:
            raise OperationalError("UPDATE jobs", {}, Exception("it is starting up"))
        return decide(*arguments, **options)

    monkeypatch.setattr(leases, write, decide_at_the_third_try)

    (row,) = ended(here, job)

    assert (row.state, len(tried)) == (state, 3)


@pytest.mark.parametrize(
    ("error", "counted_attempts", "outcome"),
    [(EngineStopped("it was stopped"), 0, "returned"), (EngineDied("it broke"), 1, "error")],
)
def test_engine_that_was_stopped_is_held_against_no_job_and_one_that_broke_is(
    here,
    error,
    counted_attempts,
    outcome,
):
    job = here.accept()
    with here.keeper.leased(job.id) as held:
        here.renderer.verdicts.decide(held, error)

    row = here.row(job)
    assert (row.state, row.counted_attempts) == ("queued", counted_attempts)
    assert outcomes(here, job) == [outcome]
    assert here.notices.poll().detail == str(error), "its worker leaves all the same"


@pytest.mark.parametrize(("in_row", "heard"), [(4, 9), (9, 4)])
def test_steps_that_are_done_again_are_counted_by_whatever_was_heard_of_last(here, in_row, heard):
    job = here.accept(num_steps=10, guidance=1.0)
    with transaction(here.database) as session:
        a_lease(session, job, ttl_s=-1)
        leases.lose(session, job.id, max_attempts=5)
        query = text("UPDATE images SET reached_step = :step WHERE job_id = :id")
        session.execute(query, {"id": job.id, "step": in_row})
    here.renderer.progress.note(job.id, Step(0, heard, 10))
    here.renderer.progress.flush(within_s=5)

    (row,) = ended(here, job)

    assert (row.state, row.attempt) == ("storing", 2)
    with transaction(here.database) as session:
        query = text("SELECT lost_steps FROM attempts WHERE job_id = :id AND attempt = 2")
        assert session.scalar(query, {"id": job.id}) == 9
