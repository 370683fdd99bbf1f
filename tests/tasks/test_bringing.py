"""Pictures that jobs start from.

Brought by who may read the store before a worker is asked, dropped in the end.
"""

import uuid
from dataclasses import dataclass, replace

import pytest
import redis

from edges.broker import job_of_message
from edges.inputs import Inputs
from edges.objectstore import ObjectStore, content_sha256, picture_key
from engine.errors import ImageNotFinite
from models import files, jobs, sweeping
from models.database import transaction
from models.tables import Attempt, File, Job, Tenant
from policy import queues
from policy.states import JobState
from settings import StoreSettings
from tasks.inputs import InputGone, InputsMissing
from tasks.roles.results import build
from tasks.staging import InputStager
from tasks.verdicts import failure_code, is_unplanned
from tests.builders import a_job, a_tenant, settings_for, until
from tests.pictures import a_picture, png
from tests.tasks.conftest import end_left_jobs, metric


@dataclass(frozen=True)
class Shelf:
    """One tenant with a picture, and whoever brings it."""

    stager: InputStager
    inputs: Inputs
    store: ObjectStore
    tenant: Tenant
    file: File


@pytest.fixture(scope="module")
def stager(stack, fleet_here, urls_here) -> InputStager:
    settings = settings_for(StoreSettings, stack.env, handoff_ttl_s=60, **urls_here)
    return build(settings, fleet_here, name="results@here").stager


@pytest.fixture
def shelf(here, stager) -> Shelf:
    with transaction(here.database) as session:
        tenant = a_tenant(session)
        content = png(a_picture(128, 128))
        key = picture_key(tenant.id, content_sha256(content))
        file = files.keep(
            session,
            tenant_id=tenant.id,
            object_key=key,
            mode="RGB",
            size_bytes=len(content),
            width_px=128,
            height_px=128,
            content_sha256=content_sha256(content),
            actor="tests",
        )
    stager.store.put(key, content, content_type="image/png")
    return Shelf(stager, stager.inputs, stager.store, tenant, file)


def accept(here, shelf, **params) -> Job:
    with transaction(here.database) as session:
        return a_job(
            session, tenant=shelf.tenant, init_file_id=shelf.file.id, strength=0.5, **params
        )


def bring(shelf, job) -> None:
    shelf.stager.stage_inputs(job_id=str(job.id))


def announced(here) -> list[uuid.UUID]:
    """The jobs whose render messages wait for a worker."""
    return _messages(here, queues.render_queue("local", "fast"))


def asked_for(here) -> list[uuid.UUID]:
    """The jobs whose pictures somebody was asked to bring."""
    return _messages(here, queues.results_queue(here.renderer.fleet, "fast"))


def _messages(here, queue) -> list[uuid.UUID]:
    return [
        job_of_message(message)
        for message in redis.Redis.from_url(here.settings.broker_url).lrange(queue, 0, -1)
    ]


@pytest.fixture
def no_messages(settings_here, database_here):
    """Nothing in the queues, and no job of another test that takes up their room."""
    end_left_jobs(database_here)
    redis.Redis.from_url(settings_here.broker_url).flushdb()


def test_pictures_are_brought_before_a_worker_is_asked(here, shelf, no_messages):
    job = accept(here, shelf, num_images=2)

    here.renderer.release.release("local", "fast")
    assert job.id in asked_for(here), "whoever stores results was asked for them"
    assert job.id not in announced(here)

    bring(shelf, job)
    assert job.id in announced(here)

    here.render(job).join(timeout=60)
    assert here.row(job).state == JobState.STORING
    assert not shelf.inputs.are_there(job.id), "dropped: the job is rendered"
    with transaction(here.database) as session:
        assert session.get(Attempt, (job.id, 1)).steps == 4, "half of the four steps of both images"


def test_a_job_without_its_pictures_gets_no_lease(here, shelf):
    job = accept(here, shelf)

    here.render(job).join(timeout=60)

    row = here.row(job)
    assert (row.state, row.attempt) == (JobState.QUEUED, 0)


def test_bringing_again_is_harmless_and_for_a_job_that_lacks_nothing_nothing_is_brought(
    here, shelf
):
    job, plain = accept(here, shelf), here.accept()
    for _ in range(3):
        bring(shelf, job)
    bring(shelf, plain)
    shelf.stager.stage_inputs(job_id=str(uuid.uuid4()))
    assert shelf.inputs.are_there(job.id)
    assert not shelf.inputs.are_there(plain.id)

    here.render(job).join(timeout=60)
    bring(shelf, job)

    assert here.row(job).state == JobState.STORING
    assert not shelf.inputs.are_there(job.id)


def test_a_hand_off_with_little_room_is_given_no_pictures(here, shelf):
    job = accept(here, shelf)
    full = replace(shelf.stager, fill=lambda: 0.75)

    full.stage_inputs(job_id=str(job.id))
    assert not shelf.inputs.are_there(job.id)
    assert here.row(job).lacks_inputs

    bring(shelf, job)
    assert not here.row(job).lacks_inputs


@pytest.mark.parametrize("what", ["row", "object"])
def test_a_picture_that_is_gone_fails_the_job_and_says_so(here, shelf, what):
    job = accept(here, shelf)
    if what == "row":
        with transaction(here.database) as session:
            session.get(File, shelf.file.id).erased_at = shelf.file.created_at
    else:
        shelf.store.delete(shelf.file.object_key)

    bring(shelf, job)
    here.render(job).join(timeout=60)

    row = here.row(job)
    assert (row.state, row.failure_code) == (JobState.FAILED, "input_gone")
    assert row.failure_detail.startswith(f"init_image: file {shelf.file.id} ")
    assert not shelf.inputs.are_there(job.id)


def test_a_job_whose_pictures_vanished_is_given_back_at_once_and_has_them_brought_again(
    here, shelf, no_messages
):
    job = accept(here, shelf)
    bring(shelf, job)
    shelf.inputs.drop([job.id])

    here.render(job).join(timeout=60)

    row = here.row(job)
    assert (row.state, row.counted_attempts, row.lacks_inputs) == (JobState.QUEUED, 0, True)
    assert job.id in asked_for(here), "as soon as it was given back"
    bring(shelf, job)
    here.render(job).join(timeout=60)
    assert here.row(job).state == JobState.STORING


def test_spoilt_pictures_are_thrown_away_and_brought_again(here, shelf):
    job = accept(here, shelf)
    bring(shelf, job)
    redis.Redis.from_url(here.settings.handoff_url).hset(
        f"input:{job.id}", "init_image", b"\x00\x00\x00\x02{}"
    )

    here.render(job).join(timeout=60)
    assert here.row(job).lacks_inputs

    bring(shelf, job)
    here.render(job).join(timeout=60)
    assert here.row(job).state == JobState.STORING


def test_a_job_that_leaves_its_worker_leaves_its_pictures_for_the_next_one(here, shelf):
    job = accept(here, shelf, tier="quality", num_steps=60)
    bring(shelf, job)
    thread = here.render(job)
    [held] = until(lambda: here.keeper.all_held())

    held.leave("a notice")
    thread.join(timeout=60)

    row = here.row(job)
    assert (row.state, row.lacks_inputs) == (JobState.QUEUED, False)
    assert shelf.inputs.are_there(job.id)


def test_pictures_are_kept_while_a_job_may_need_them_and_then_found_by_the_sweeper(here, shelf):
    waiting, over = accept(here, shelf), accept(here, shelf)
    for job in (waiting, over):
        bring(shelf, job)
    with transaction(here.database) as session:
        jobs.cancel(session, over.id, tenant_id=shelf.tenant.id, actor="tests")

    with transaction(here.database) as session:
        unread = sweeping.rendered_of(session, shelf.inputs.jobs())

    assert over.id in unread
    assert waiting.id not in unread


def test_pictures_that_were_asked_for_in_vain_are_asked_for_again(here, shelf, no_messages):
    job = accept(here, shelf)
    release = here.renderer.release
    release.release("local", "fast")

    release.ask_for_inputs_again("local", "fast", asked_before_s=3600)
    assert asked_for(here).count(job.id) == 1, "not yet"
    release.ask_for_inputs_again("local", "fast", asked_before_s=-1)
    assert asked_for(here).count(job.id) == 2

    bring(shelf, job)
    release.ask_for_inputs_again("local", "fast", asked_before_s=-1)
    assert asked_for(here).count(job.id) == 2, "they are there"


def test_errors_about_pictures_are_told_apart_by_what_follows_from_them():
    assert (
        failure_code(InputGone("init_image: file x was erased"), is_exclusive=False) == "input_gone"
    )
    assert failure_code(InputsMissing("late"), is_exclusive=True) is None
    assert not is_unplanned(InputGone("gone"))
    assert not is_unplanned(InputsMissing("late"))
    assert failure_code(ImageNotFinite("nan"), is_exclusive=False) == "not_finite"


def test_sweep_measures_the_jobs_that_lack_their_pictures(here, shelf, sweeper, no_messages):
    def lacking() -> float:
        sweeper.sweep()
        return metric("darkroom_jobs_lacking_inputs", pool="local", tier="fast")

    before = lacking()
    job = accept(here, shelf)
    here.renderer.release.release("local", "fast")
    assert lacking() == before + 1

    bring(shelf, job)
    assert lacking() == before


@pytest.mark.parametrize(("width_px", "height_px"), [(128, 192), (192, 128)])
def test_picture_is_brought_in_the_size_of_its_job_and_not_on_its_side(
    here,
    shelf,
    width_px,
    height_px,
):
    job = accept(here, shelf, width_px=width_px, height_px=height_px)

    bring(shelf, job)

    assert shelf.inputs.of(job.id)["init_image"].shape == (height_px, width_px, 3)


def test_job_that_lacks_one_of_its_pictures_is_given_back_and_has_all_brought_again(here, shelf):
    job = accept(here, shelf, mask_file_id=shelf.file.id)
    bring(shelf, job)
    redis.Redis.from_url(here.settings.handoff_url).hdel(f"input:{job.id}", "mask")

    here.render(job).join(timeout=60)
    row = here.row(job)
    assert (row.state, row.counted_attempts, row.lacks_inputs) == (JobState.QUEUED, 0, True)
    assert not shelf.inputs.are_there(job.id), "or what is there would be taken for all"

    bring(shelf, job)
    here.render(job).join(timeout=60)
    assert here.row(job).state == JobState.STORING
