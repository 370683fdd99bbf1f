"""What a worker counts: images and their device time, what came twice, what went wrong, what was
spared.
"""

import uuid

import pytest
from sqlalchemy import text

from models import jobs
from models.database import transaction
from tests.builders import until
from tests.metrics import increases
from tests.tasks.conftest import left_at_its_first_checkpoint

QUALITY = {"tier": "quality", "determinism": "reproducible", "bucket_rows": 2, "guidance": 1.0}


def rendered(here, job) -> None:
    thread = here.render(job)
    thread.join(timeout=60)
    assert not thread.is_alive()


def attempt_of(here, job, number=1):
    with transaction(here.database) as session:
        query = text("SELECT * FROM attempts WHERE job_id = :id AND attempt = :number")
        return session.execute(query, {"id": job.id, "number": number}).one()


def test_a_worker_counts_images_and_their_device_time_by_tier_and_model(here):
    job = here.accept(num_images=2)

    with increases() as grown:
        rendered(here, job)

    seconds = grown.pop('device_seconds{tier="fast",model="pocket"}')
    assert grown == {'images_rendered{tier="fast",model="pocket"}': 2}
    assert seconds == pytest.approx(attempt_of(here, job).device_seconds)


def test_a_message_that_comes_twice_or_for_nothing_is_counted(here):
    job = here.accept()
    rendered(here, job)

    with increases() as grown:
        rendered(here, job)
        here.renderer.render_job(job_id=str(uuid.uuid4()))

    assert grown == {'duplicate_messages{task="render"}': 2}


def test_a_job_whose_model_is_gone_fails_with_a_code_of_its_own_and_names_no_other_model(here):
    job = here.accept(model="large", model_version="3")

    rendered(here, job)

    row = here.row(job)
    detail = "model large, version 3, is no longer offered"
    assert (row.failure_code, row.failure_detail) == ("model_gone", detail)


def test_an_error_is_counted_by_its_kind(here):
    job = here.accept(clip_skip=99)

    with increases() as grown:
        rendered(here, job)

    assert here.row(job).failure_code == "unsupported"
    assert grown == {
        'render_errors{kind="UnsupportedRequest"}': 1,
        'jobs_ended{tier="fast",model="pocket",state="failed"}': 1,
    }


def test_a_job_that_its_tenant_takes_back_is_a_lost_lease_to_its_worker(here):
    job = here.accept(**QUALITY, num_steps=1000)
    thread = here.render(job)
    until(lambda: here.snapshots.of(job.id), within_s=60, what="a checkpoint")

    with increases() as grown:
        with transaction(here.database) as session:
            jobs.cancel(session, job.id, tenant_id=job.tenant_id, actor="tests")
        thread.join(timeout=60)

    assert not thread.is_alive()
    assert grown["leases_lost"] == 1
    assert {name.partition("{")[0] for name in grown} <= {"leases_lost", "checkpoints"}


def test_steps_that_a_preemption_spares_are_counted(here, brake):
    job = here.accept(**QUALITY, num_steps=8)

    with increases() as given_up:
        left_at_its_first_checkpoint(here, brake, job)
    with increases() as resumed:
        rendered(here, job)

    second = attempt_of(here, job, 2)
    assert given_up["jobs_preempted"] == 1
    assert resumed["steps_resumed"] == second.resumed_steps > 0
    assert resumed['images_rendered{tier="quality",model="pocket"}'] == 1
    lost = {name: count for name, count in resumed.items() if name.startswith("steps_lost")}
    assert sum(lost.values()) == second.lost_steps
