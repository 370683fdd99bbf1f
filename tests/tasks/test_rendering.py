"""What a worker does beside making pixels: it lets others go, asks for storing, ends previews."""

import threading

import pytest
from sqlalchemy import text
from structlog.testing import capture_logs

from edges.broker import BrokerUnavailable
from engine.handle import Handle
from models.database import transaction
from policy import queues
from tests.builders import until

QUALITY = {"tier": "quality", "determinism": "reproducible", "bucket_rows": 8}
LONG = {**QUALITY, "num_steps": 60}


def rendered(here, job) -> None:
    thread = here.render(job)
    thread.join(timeout=60)
    assert not thread.is_alive()


def under_way(here, job) -> threading.Thread:
    """The task of a job one of whose images has begun."""
    thread = here.render(job)
    until(lambda: here.keeper.all_held() and here.keeper.all_held()[0].expected_s(), what="a step")
    return thread


def rendering_ends(here, job, how: str) -> None:
    if how == "rendered":
        rendered(here, job)
        return
    if how == "failed":
        with transaction(here.database) as session:
            query = text("UPDATE jobs SET sampler = 'nobody''s' WHERE id = :id")
            session.execute(query, {"id": job.id})
        rendered(here, job)
        return
    thread = under_way(here, job)
    [held] = here.keeper.all_held()
    if how == "lost":
        held.lose()
    else:
        held.leave("a test wants it")
    thread.join(timeout=60)
    assert not thread.is_alive()


ENDS = {"rendered": QUALITY, "failed": QUALITY, "lost": LONG, "given up": LONG}


@pytest.mark.parametrize("how", ENDS)
def test_end_of_a_job_on_its_worker_lets_the_next_one_of_its_tier_go_at_once(here, how):
    job, next_one = here.accept(**ENDS[how]), here.accept(tier="quality")
    other_tier = here.accept(tier="batch")
    assert here.row(next_one).announced_at is None

    rendering_ends(here, job, how)

    assert here.row(next_one).announced_at is not None
    assert here.row(other_tier).announced_at is None
    if how == "given up":
        assert here.row(job).announced_at is not None, "to another worker"


@pytest.mark.parametrize("how", ENDS)
def test_job_that_has_left_its_worker_is_shown_to_nobody_there(here, monkeypatch, how):
    watched = []
    monkeypatch.setattr(Handle, "watch", lambda handle, on=True: watched.append(on))
    job, running = here.accept(**ENDS[how]), here.accept(**LONG)

    rendering_ends(here, job, how)
    here.renderer.previews.show(job.id)
    assert watched == []

    thread = under_way(here, running)
    here.renderer.previews.show(running.id)
    assert watched == [True]
    here.keeper.drop(running.id)
    thread.join(timeout=30)


def test_storing_is_asked_for_when_the_hand_off_is_on_record_and_not_before(here, monkeypatch):
    job, announce, on_record = here.accept(num_images=2), here.renderer.broker.announce, []

    def look(task_name, queue, job_id, **options):
        if task_name == queues.STORE_IMAGES:
            with transaction(here.database) as session:
                query = text(
                    "SELECT count(*) FROM images WHERE job_id = :id AND state = 'handed_off'"
                )
                on_record.append((queue, session.scalar(query, {"id": job_id})))
        announce(task_name, queue, job_id, **options)

    monkeypatch.setattr(here.renderer.broker, "announce", look)

    rendered(here, job)

    assert on_record == [("results.fast", 1), ("results.fast", 2)]


def test_broker_that_is_away_keeps_no_worker_from_the_rest_of_its_job(here, monkeypatch):
    job = here.accept(num_images=3)

    def refuse(*arguments, **options):
        raise BrokerUnavailable("it is read-only")

    monkeypatch.setattr(here.renderer.broker, "announce", refuse)

    rendered(here, job)

    row = here.row(job)
    assert (row.state, row.attempt, row.counted_attempts) == ("storing", 1, 0)
    swept_in_s = (row.store_by - row.rendered_at).total_seconds()
    assert swept_in_s == pytest.approx(here.settings.store_within_s, abs=1)


def test_refusal_that_is_the_request_s_fault_is_one_line_and_no_traceback(here):
    job = here.accept(clip_skip=99)

    with capture_logs() as logged:
        here.render(job).join(60)

    assert here.row(job).failure_code == "unsupported"
    [refused] = [line for line in logged if line["event"] == "render_refused"]
    assert "exc_info" not in refused
    assert refused["detail"].startswith("clip_skip: 99")
    assert "render_failed" not in [line["event"] for line in logged]


def test_first_preview_of_a_watched_job_is_noted_and_of_another_none(here):
    watched, other = here.accept(**LONG), here.accept(**QUALITY)
    thread = under_way(here, watched)
    here.renderer.previews.show(watched.id)
    thread.join(timeout=60)
    rendered(here, other)

    row = here.row(watched)
    assert row.started_at < row.first_preview_at <= row.rendered_at
    assert here.row(other).first_preview_at is None
