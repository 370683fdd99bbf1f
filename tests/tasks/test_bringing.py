"""Pictures that jobs start from: asked for by the worker, brought by who may read the store, dropped in the end."""

import time
import uuid
from dataclasses import dataclass

import numpy as np
import pytest

from edges.inputs import Inputs
from edges.objectstore import ObjectStore, content_sha256, picture_key
from engine.errors import ImageNotFinite
from models import files, sweeping
from models.database import transaction
from models.states import JobState
from models.tables import Attempt, File, Job, Tenant
from policy import queues
from settings import StoreSettings
from tasks.bring import Bringer
from tasks.inputs import InputGone, InputsLate
from tasks.verdicts import failure_code, is_unplanned
from tests.builders import a_job, a_tenant, settings_for, until
from tests.pictures import a_picture, png


@dataclass(frozen=True)
class Shelf:
    """One tenant with a picture, and whoever brings it."""

    bringer: Bringer
    inputs: Inputs
    store: ObjectStore
    tenant: Tenant
    file: File


@pytest.fixture
def shelf(stack, here, settings_here) -> Shelf:
    changes = {"broker_url": settings_here.broker_url, "handoff_url": settings_here.handoff_url}
    store = ObjectStore(settings_for(StoreSettings, stack.env, **changes))
    inputs = Inputs(settings_here.handoff_url, ttl_s=60)
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
    store.put(key, content, content_type="image/png")
    return Shelf(Bringer(database=here.database, inputs=inputs, store=store), inputs, store, tenant, file)


def accept(here, shelf, **params) -> Job:
    with transaction(here.database) as session:
        return a_job(session, tenant=shelf.tenant, init_file_id=shelf.file.id, strength=0.5, **params)


def bring(here, shelf, job) -> None:
    until(lambda: here.row(job).state == JobState.RUNNING)
    shelf.bringer.bring_inputs(job_id=str(job.id))


def test_a_worker_asks_whoever_stores_results_and_renders_when_the_picture_is_there(here, shelf):
    job = accept(here, shelf, num_images=2)

    thread = here.render(job)
    until(lambda: here.renderer.broker.next_job(queues.results_queue(here.renderer.fleet, "fast")) is not None)
    bring(here, shelf, job)
    thread.join(timeout=30)

    assert here.row(job).state == JobState.STORING
    assert not shelf.inputs.are_there(job.id), "dropped: the job is rendered"
    with transaction(here.database) as session:
        assert session.get(Attempt, (job.id, 1)).steps == 4, "half of the four steps of both images"


def test_bringing_again_is_harmless_and_for_a_job_that_does_not_run_nothing_is_brought(here, shelf):
    job = accept(here, shelf)
    shelf.bringer.bring_inputs(job_id=str(job.id))
    shelf.bringer.bring_inputs(job_id=str(uuid.uuid4()))
    assert not shelf.inputs.are_there(job.id)

    thread = here.render(job)
    for _ in range(3):
        bring(here, shelf, job)
    thread.join(timeout=30)

    assert here.row(job).state == JobState.STORING


@pytest.mark.parametrize("what", ["row", "object"])
def test_a_picture_that_is_gone_fails_the_job_and_says_so(here, shelf, what):
    job = accept(here, shelf)
    if what == "row":
        with transaction(here.database) as session:
            session.get(File, shelf.file.id).erased_at = shelf.file.created_at
    else:
        shelf.store.delete(shelf.file.object_key)

    thread = here.render(job)
    bring(here, shelf, job)
    thread.join(timeout=30)

    row = here.row(job)
    assert (row.state, row.failure_code) == (JobState.FAILED, "input_gone")
    assert row.failure_detail.startswith(f"init_image: file {shelf.file.id} ")
    assert not shelf.inputs.are_there(job.id)


def test_a_job_whose_picture_does_not_come_is_given_back_and_that_is_not_held_against_it(here, shelf):
    job = accept(here, shelf)

    here.render(job).join(timeout=30)

    row = here.row(job)
    assert (row.state, row.counted_attempts) == (JobState.QUEUED, 0)


def test_a_cancel_ends_the_wait_at_once(here, shelf):
    job = accept(here, shelf)
    thread = here.render(job)
    until(lambda: here.keeper.all_held())

    began = time.monotonic()
    here.keeper.drop(job.id)
    thread.join(timeout=30)

    assert time.monotonic() - began < 1


def test_a_worker_that_has_to_go_does_not_wait_either(here, shelf):
    job = accept(here, shelf)
    thread = here.render(job)
    [held] = until(lambda: here.keeper.all_held())

    held.leave("a notice")
    thread.join(timeout=2)

    assert not thread.is_alive()
    assert here.row(job).state == JobState.QUEUED


def test_what_a_dead_worker_left_is_found_by_the_sweeper(here, shelf):
    job = accept(here, shelf)
    shelf.inputs.bring(job.id, {"init_image": np.zeros((2, 2, 3), np.uint8)})

    assert job.id in shelf.inputs.jobs()
    with transaction(here.database) as session:
        assert job.id in sweeping.not_running_of(session, shelf.inputs.jobs())
    shelf.inputs.drop([job.id])
    assert job.id not in shelf.inputs.jobs()


def test_what_an_error_about_pictures_means():
    assert failure_code(InputGone("init_image: file x was erased"), is_alone=False) == "input_gone"
    assert failure_code(InputsLate("late"), is_alone=True) is None
    assert not is_unplanned(InputGone("gone"))
    assert not is_unplanned(InputsLate("late"))
    assert failure_code(ImageNotFinite("nan"), is_alone=False) == "not_finite"
