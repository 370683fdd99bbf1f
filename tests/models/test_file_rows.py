"""Rows of pictures that tenants bring.

One per content, erased only while nobody needs it, and its object's end.
"""

import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text
from sqlalchemy.orm import Session

from models import files, jobs, uploads
from models.database import transaction
from tests.builders import a_job, a_succeeded_job, a_tenant, until
from tests.models.facts import at_once


@pytest.fixture
def tenant(session):
    return a_tenant(session)


def keep(session, tenant, key=None):
    digest = uuid.uuid4().hex * 2
    key = key or f"t/{tenant.id}/sha256/{digest}.png"
    shape = {"mode": "RGB", "size_bytes": 10, "width_px": 2, "height_px": 3}
    return files.keep(
        session, tenant_id=tenant.id, object_key=key, content_sha256=digest, actor="tests", **shape
    )


def erase(session, file):
    return files.erase(session, file.id, tenant_id=file.tenant_id, actor="tests")


def test_keeping_strikes_the_upload_out(session, tenant):
    key = f"t/{uuid.uuid4()}"
    uploads.begin(session, key)

    keep(session, tenant, key)

    assert (
        session.scalar(text("SELECT count(*) FROM uploads WHERE object_key = :key"), {"key": key})
        == 0
    )


def test_the_same_content_again_is_the_row_that_is_there(session, tenant):
    first = keep(session, tenant)
    shape = {"mode": "RGB", "size_bytes": 10, "width_px": 2, "height_px": 3}

    again = files.keep(
        session,
        tenant_id=tenant.id,
        object_key=first.object_key,
        content_sha256=first.content_sha256,
        actor="tests",
        **shape,
    )

    assert again.id == first.id
    assert files.find_content(session, first.content_sha256, tenant_id=tenant.id).id == first.id
    assert files.find_content(session, first.content_sha256, tenant_id=a_tenant(session).id) is None


def test_an_erased_file_is_found_no_more_and_its_object_is_left_behind(session, tenant):
    file = keep(session, tenant)

    erase(session, file)
    erase(session, file)

    assert files.find(session, file.id, tenant_id=tenant.id) is None
    assert files.page(session, tenant_id=tenant.id, limit=5) == []
    assert uploads.are_left_behind(session, older_than_s=600)
    assert uploads.left_behind(session, older_than_s=600) == file.object_key


@pytest.mark.parametrize("column", ["init_file_id", "mask_file_id", "control_file_id"])
def test_a_file_is_in_use_until_the_job_has_ended(session, tenant, column):
    file = keep(session, tenant)
    start = {"init_file_id": file.id, "strength": 0.5} if column != "control_file_id" else {}
    job = a_job(session, tenant=tenant, **{**start, column: file.id})

    with pytest.raises(files.FileInUse):
        erase(session, file)
    jobs.cancel(session, job.id, tenant_id=tenant.id, actor="tests")

    assert erase(session, file).erased_at is not None


def test_an_object_that_something_else_names_stays(session, tenant):
    job = a_succeeded_job(session)
    key = session.scalar(
        text("SELECT object_key FROM artifacts WHERE job_id = :id"), {"id": job.id}
    )
    file = keep(session, tenant, key)

    erase(session, file)
    assert uploads.left_behind(session, older_than_s=600) is None

    other = keep(session, tenant)
    uploads.give_up(session, other.object_key)
    assert uploads.left_behind(session, older_than_s=600) is None


def test_an_object_goes_with_the_last_that_names_it(session, tenant):
    job = a_succeeded_job(session)
    key = session.scalar(
        text("SELECT object_key FROM artifacts WHERE job_id = :id"), {"id": job.id}
    )
    file = keep(session, tenant, key)
    session.execute(
        text("UPDATE artifacts SET erased_at = now() WHERE job_id = :id"), {"id": job.id}
    )

    erase(session, file)

    assert uploads.left_behind(session, older_than_s=600) == key


def test_an_object_that_is_given_up_while_it_is_stored_again_is_not_deleted(session):
    key = f"t/{uuid.uuid4()}"
    uploads.begin(session, key)

    uploads.give_up(session, key)

    assert uploads.left_behind(session, older_than_s=600) is None


def test_no_job_is_accepted_that_starts_from_an_erased_or_a_stranger_s_file(session, tenant):
    erased, strange = keep(session, tenant), keep(session, a_tenant(session))
    erase(session, erased)

    for file in (erased, strange):
        with pytest.raises(files.FileGone) as caught:
            a_job(session, tenant=tenant, init_file_id=file.id, strength=0.5)
        assert caught.value.file_id == file.id


def test_erasing_a_file_waits_for_a_job_that_is_being_accepted_and_finds_it_in_use(
    database,
):
    with transaction(database.app) as session:
        tenant = a_tenant(session)
        file = keep(session, tenant)

    def erase_it():
        with transaction(database.app) as session:
            return erase(session, file)

    with ThreadPoolExecutor(1) as threads:
        with transaction(database.app) as session:
            a_job(session, tenant=tenant, init_file_id=file.id, strength=0.5)
            erasing = threads.submit(erase_it)
            until(lambda: waits_for_a_lock(database), what="the erasure")

        with pytest.raises(files.FileInUse):
            erasing.result()


def waits_for_a_lock(database) -> bool:
    with transaction(database.owner) as session:
        query = (
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
            "AND wait_event_type = 'Lock'"
        )
        return session.scalar(text(query)) > 0


def test_files_are_counted_until_they_are_erased(session, tenant):
    assert files.stored(session, tenant_id=tenant.id) == (0, 0)
    first, _ = keep(session, tenant), keep(session, tenant)
    keep(session, a_tenant(session))

    assert files.stored(session, tenant_id=tenant.id) == (2, 20)
    for _ in range(2):
        erase(session, first)
    assert files.stored(session, tenant_id=tenant.id) == (1, 10)


def test_several_files_are_found_at_once_and_only_the_tenant_s_own(session, tenant):
    own, erased, other = (
        keep(session, tenant),
        keep(session, tenant),
        keep(session, a_tenant(session)),
    )
    erase(session, erased)

    found = files.find_all(
        session, [own.id, erased.id, other.id, uuid.uuid4()], tenant_id=tenant.id
    )

    assert found == {own.id: own}


def test_two_who_keep_a_file_at_once_are_both_counted(database):
    with Session(database.app, expire_on_commit=False) as session:
        tenant = a_tenant(session)
        session.commit()

    def store():
        with Session(database.app) as session:
            keep(session, tenant)
            _, size_bytes = files.stored(session, tenant_id=tenant.id)
            session.commit()
        return size_bytes

    assert sorted(at_once(*[store] * 8)) == [10 * count for count in range(1, 9)]
