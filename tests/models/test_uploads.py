"""Objects on their way into the store.

Noted before the upload, struck out with their artifact, found when neither came of it.
"""

import threading
import uuid

import pytest
from sqlalchemy import text

from models import erasing, uploads
from models.database import transaction
from tests.builders import a_lease, a_succeeded_job, an_artifact, hand_off, store


@pytest.fixture
def key() -> str:
    return f"t/x/sha256/{uuid.uuid4().hex}.png"


def begin(session, key, *, ago_s=0.0):
    """Note an upload that began that long ago."""
    uploads.begin(session, key)
    query = (
        "UPDATE uploads SET started_at = started_at - make_interval(secs => :ago) "
        "WHERE object_key = :key"
    )
    session.execute(text(query), {"ago": ago_s, "key": key})


def is_noted(session, key) -> bool:
    return (
        session.scalar(text("SELECT count(*) FROM uploads WHERE object_key = :key"), {"key": key})
        == 1
    )


def test_an_interrupted_upload_is_found_when_its_time_is_over(session, key):
    begin(session, key, ago_s=100)

    assert not uploads.are_left_behind(session, older_than_s=120)
    assert uploads.left_behind(session, older_than_s=120) is None
    assert uploads.are_left_behind(session, older_than_s=90)
    assert uploads.left_behind(session, older_than_s=90) == key


def test_the_longest_interrupted_are_found_first_and_one_at_a_time(session):
    keys = [f"t/x/{uuid.uuid4().hex}" for _ in range(3)]
    for key, ago_s in zip(keys, (100, 300, 200), strict=True):
        begin(session, key, ago_s=ago_s)

    found = []
    while (key := uploads.left_behind(session, older_than_s=90)) is not None:
        found.append(key)
        uploads.end(session, key)

    assert found == [keys[1], keys[2], keys[0]]


def test_an_upload_that_begins_again_has_all_its_time(session, key):
    begin(session, key, ago_s=100)

    uploads.begin(session, key)

    assert uploads.left_behind(session, older_than_s=90) is None
    assert is_noted(session, key)


def test_an_upload_struck_out_is_found_no_more_and_striking_it_out_again_is_harmless(session, key):
    begin(session, key, ago_s=100)

    uploads.end(session, key)
    uploads.end(session, key)

    assert not is_noted(session, key)
    assert not uploads.are_left_behind(session, older_than_s=90)


def test_the_commit_that_names_the_artifact_strikes_the_upload_out(session):
    artifact, lease = an_artifact(), a_lease(session)
    hand_off(session, lease)
    begin(session, artifact["object_key"], ago_s=100)

    store(session, lease.job, artifact=artifact)

    assert not is_noted(session, artifact["object_key"])


def test_a_store_that_is_refused_leaves_the_object_to_be_found(session):
    artifact, lease = an_artifact(), a_lease(session)
    begin(session, artifact["object_key"], ago_s=100)

    assert store(session, lease.job, artifact=artifact) is None

    assert uploads.left_behind(session, older_than_s=90) == artifact["object_key"]


def test_an_object_of_an_artifact_is_not_deleted_because_another_upload_of_it_began(
    session,
):
    job = a_succeeded_job(session)
    key = session.scalar(
        text("SELECT object_key FROM artifacts WHERE job_id = :id"), {"id": job.id}
    )
    begin(session, key, ago_s=100)

    assert uploads.left_behind(session, older_than_s=90) is None
    assert not is_noted(session, key)


def test_two_who_tidy_up_at_once_do_not_delete_the_same(database, key):
    with transaction(database.app) as session:
        begin(session, key, ago_s=100)

    with transaction(database.app) as first, transaction(database.app) as second:
        assert uploads.left_behind(first, older_than_s=90) == key
        assert uploads.left_behind(second, older_than_s=90) is None
        uploads.end(first, key)

    with transaction(database.app) as session:
        assert not is_noted(session, key)


def test_an_upload_does_not_begin_while_its_object_is_being_deleted(database, key):
    began = threading.Event()
    with transaction(database.app) as session:
        begin(session, key, ago_s=100)

    def upload():
        with transaction(database.app) as session:
            uploads.begin(session, key)
            began.set()

    with transaction(database.app) as session:
        assert uploads.left_behind(session, older_than_s=90) == key
        uploader = threading.Thread(target=upload)
        uploader.start()
        assert not began.wait(0.3), "the object would be deleted right after it was stored"
        uploads.end(session, key)
    uploader.join(timeout=10)

    assert began.is_set()
    with transaction(database.app) as session:
        assert is_noted(session, key)
        assert uploads.left_behind(session, older_than_s=90) is None


def test_a_doubled_delivery_leaves_no_note_that_keeps_an_erased_picture_in_the_store(session):
    job = a_succeeded_job(session)
    key = session.scalar(
        text("SELECT object_key FROM artifacts WHERE job_id = :id"), {"id": job.id}
    )
    begin(session, key)  # by the second delivery, when the first had stored the image already

    uploads.end_if_named(session, key)
    assert not is_noted(session, key)

    erasing.erase(session, job.id, tenant_id=job.tenant_id, actor="tests")
    assert uploads.left_behind(session, older_than_s=600) == key


def test_a_note_of_what_nothing_names_stays(session, key):
    begin(session, key)

    uploads.end_if_named(session, key)

    assert is_noted(session, key)
