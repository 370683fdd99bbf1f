"""Storing what was rendered: killed, refused or asked twice, an image is stored once."""

import pytest
import redis
from sqlalchemy import text

from edges.objectstore import ObjectGone, StoreUnavailable
from models import jobs
from models.database import transaction
from models.tables import Image
from models.uploads import ORPHAN_AFTER_S
from settings import StoreSettings
from tasks.roles.results import build
from tasks.store import Storekeeper
from tests.builders import settings_for, until
from tests.tasks.conftest import metric


@pytest.fixture(scope="module")
def storekeeper(stack, fleet_here, urls_here) -> Storekeeper:
    """A results worker's tasks, for the jobs of the worker `here`."""
    settings = settings_for(StoreSettings, stack.env, handoff_ttl_s=60, **urls_here)
    return build(settings, fleet_here, name="results@here").storekeeper


@pytest.fixture
def rendered_job(here):
    """Accept and render a job; it waits to be stored."""

    def rendered_job(**params):
        job = here.accept(**params)
        here.render(job).join(timeout=60)
        assert here.row(job).state == "storing"
        return job

    return rendered_job


def uploads_of(here, job) -> dict:
    with transaction(here.database) as session:
        prefix = f"%{job.tenant_id}%"
        rows = session.execute(
            text("SELECT object_key, started_at FROM uploads WHERE object_key LIKE :p"),
            {"p": prefix},
        )
        return {row.object_key: row.started_at for row in rows}


def age_uploads(here, job) -> None:
    with transaction(here.database) as session:
        session.execute(
            text(
                "UPDATE uploads SET started_at = started_at - make_interval(secs => :s) "
                "WHERE object_key LIKE :p",
            ),
            {"s": ORPHAN_AFTER_S + 1, "p": f"%{job.tenant_id}%"},
        )


def images_of(here, job) -> list[str]:
    with transaction(here.database) as session:
        query = text("SELECT state FROM images WHERE job_id = :id ORDER BY index")
        return list(session.scalars(query, {"id": job.id}))


@pytest.mark.parametrize("killed_at", ["upload", "commit"])
def test_upload_that_no_commit_followed_is_an_orphan_that_tidying_deletes(
    here,
    storekeeper,
    rendered_job,
    monkeypatch,
    killed_at,
):
    job, put = rendered_job(), storekeeper.store.put

    def put_and_die(key, content, **options):
        put(key, content, **options)
        raise KeyboardInterrupt

    def die(*arguments, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        if killed_at == "upload":
            patched.setattr(storekeeper.store, "put", put_and_die)
        else:
            patched.setattr(jobs, "store", die)
        storekeeper.store_images(job_id=str(job.id))
    [key] = uploads_of(here, job)
    assert storekeeper.store.get(key)

    storekeeper.tidy_store()
    assert storekeeper.store.get(key), "it may be under way"

    age_uploads(here, job)
    storekeeper.tidy_store()
    assert uploads_of(here, job) == {}
    with pytest.raises(ObjectGone):
        storekeeper.store.get(key)
    storekeeper.store_images(job_id=str(job.id))
    assert here.row(job).state == "succeeded"


def test_stored_job_leaves_nothing_in_the_hand_off_and_is_told_of(
    here,
    storekeeper,
    rendered_job,
    ended_jobs,
):
    job = rendered_job(num_images=2)
    here.snapshots.put(job.id, 0, 1, 2, b"of an attempt before")

    storekeeper.store_images(job_id=str(job.id))

    assert here.row(job).state == "succeeded"
    assert here.snapshots.of(job.id) == {}
    assert not any(storekeeper.handoff.holds(job.id, index, 1) for index in range(2))
    assert uploads_of(here, job) == {}
    until(lambda: job.id in ended_jobs, what="the word of its end")


def test_message_that_finds_nothing_to_store_is_counted_and_changes_nothing(
    here,
    storekeeper,
    rendered_job,
):
    job = rendered_job()
    storekeeper.store_images(job_id=str(job.id))
    cost, before = here.row(job).cost, metric("darkroom_duplicate_messages_total", task="store")

    storekeeper.store_images(job_id=str(job.id))

    assert metric("darkroom_duplicate_messages_total", task="store") == before + 1
    assert here.row(job).cost == cost


def test_jobs_refused_by_a_store_that_was_away_are_due_as_soon_as_it_takes_something(
    here,
    storekeeper,
    rendered_job,
    monkeypatch,
):
    refused, taken = rendered_job(), rendered_job()

    def refuse(*arguments, **options):
        raise StoreUnavailable("503")

    def is_due(job) -> bool:
        with transaction(here.database) as session:
            return session.scalar(
                text("SELECT store_by <= clock_timestamp() FROM jobs WHERE id = :id"),
                {"id": job.id},
            )

    with monkeypatch.context() as patched:
        patched.setattr(storekeeper.store, "put", refuse)
        storekeeper.store_images(job_id=str(refused.id))
    assert (here.row(refused).state, is_due(refused)) == ("storing", False)

    storekeeper.store_images(job_id=str(taken.id))

    assert (here.row(taken).state, is_due(refused)) == ("succeeded", True)


def test_spoilt_pixels_are_rendered_again_and_the_others_stored(here, storekeeper, rendered_job):
    job = rendered_job(num_images=2)
    with redis.Redis.from_url(here.settings.handoff_url) as client:
        client.set(f"handoff:{job.id}:0:1", b"\x00\x00\x00\x02{}not pixels")

    storekeeper.store_images(job_id=str(job.id))

    assert (here.row(job).state, images_of(here, job)) == ("queued", ["pending", "stored"])
    here.render(job).join(timeout=60)
    storekeeper.store_images(job_id=str(job.id))
    assert (here.row(job).state, here.row(job).attempt) == ("succeeded", 2)


def test_job_whose_pixels_vanish_every_time_fails_and_is_told_of(here, storekeeper, ended_jobs):
    job = here.accept()
    with transaction(here.database) as session:
        session.get(Image, (job.id, 0)).hand_offs_lost = 3
    for lost in (4, 5):
        here.render(job).join(timeout=60)
        storekeeper.handoff.drop(job.id, 0, here.row(job).attempt)
        assert not ended_jobs
        storekeeper.store_images(job_id=str(job.id))
        assert here.row(job).state == ("queued" if lost < 5 else "failed")

    row = here.row(job)
    assert (row.failure_code, row.counted_attempts, row.cost) == ("not_stored", 0, None)
    until(lambda: job.id in ended_jobs, what="the word of its end")


def test_tidying_has_an_end_however_much_is_left(storekeeper, monkeypatch):
    calls = []
    monkeypatch.setattr(type(storekeeper), "_tidy_one", lambda self: calls.append(1) or True)
    monkeypatch.setattr("tasks.store.TIDY_FOR_S", 0.1)

    storekeeper.tidy_store()

    assert calls, "and it came back"


def test_second_delivery_that_comes_too_late_leaves_no_note_of_its_upload(
    here,
    storekeeper,
    rendered_job,
    monkeypatch,
):
    job, get = rendered_job(), storekeeper.handoff.get

    def get_and_be_overtaken(*key):
        pixels = get(*key)
        monkeypatch.setattr(storekeeper.handoff, "get", get)
        storekeeper.store_images(job_id=str(job.id))
        return pixels

    monkeypatch.setattr(storekeeper.handoff, "get", get_and_be_overtaken)

    storekeeper.store_images(job_id=str(job.id))

    assert (here.row(job).state, images_of(here, job)) == ("succeeded", ["stored"])
    assert uploads_of(here, job) == {}, "or who erases it would have to wait for that upload"


def test_job_whose_pixels_are_gone_is_announced_at_once(here, storekeeper, rendered_job):
    job = rendered_job()
    storekeeper.handoff.drop(job.id, 0, 1)

    storekeeper.store_images(job_id=str(job.id))

    row = here.row(job)
    assert row.state == "queued"
    assert row.announced_at is not None


def test_followers_are_told_of_each_stored_image_with_its_own_seed(
    here,
    storekeeper,
    rendered_job,
    monkeypatch,
):
    job, told = rendered_job(num_images=2, seed=5), []
    monkeypatch.setattr(
        storekeeper.signals, "publish_stored", lambda job_id, image: told.append(image)
    )

    storekeeper.store_images(job_id=str(job.id))

    assert [(image["index"], image["seed"]) for image in told] == [(0, 5), (1, 6)]
