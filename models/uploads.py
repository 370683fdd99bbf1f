"""Note objects on their way into the object store, or out of it.

An upload is noted before it begins, and the note is deleted in the transaction that writes the
artifact or file with its key. So what a crash between the two left behind is found without listing
the bucket; an object that is given up gets the same kind of note. Keys are content-addressed: a
picture and two jobs' images may be the same object, and share one note.
"""

from sqlalchemy import ColumnElement, delete, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from models.database import statement_time
from models.tables import Artifact, File, Upload

# No upload takes that long: its task is dead, or found that the image was stored already.
ORPHAN_AFTER_S = 600.0


def begin(session: Session, object_key: str) -> None:
    """Note that the object is about to be stored.

    Waits for a transaction that is deleting it as an orphan right now.
    """
    started_at = func.clock_timestamp()
    note = insert(Upload).values(object_key=object_key, started_at=started_at)
    session.execute(
        note.on_conflict_do_update(
            index_elements=[Upload.object_key], set_={"started_at": started_at}
        )
    )


def end(session: Session, object_key: str) -> None:
    """Delete the note: this transaction writes the artifact or file that names the object."""
    session.execute(delete(Upload).where(Upload.object_key == object_key))


def end_if_named(session: Session, object_key: str) -> None:
    """Delete a note that was made in vain, if an artifact or file names the object.

    Another delivery of the same pixels has stored it. If the note stayed, it would look like an
    upload under way, and giving up the object would have to wait for ORPHAN_AFTER_S.
    """
    note = select(Upload.object_key).where(Upload.object_key == object_key).with_for_update()
    if session.scalar(note) is not None and _is_named(session, object_key):
        end(session, object_key)


def give_up(session: Session, object_key: str) -> None:
    """Note that the caller needs the object no more, so that `left_behind` finds it at once.

    Unless it is just being stored again. Waits for a transaction that is checking right now whether
    anything names the object: it may not see yet what the caller changed.
    """
    note = insert(Upload).values(object_key=object_key, started_at=func.to_timestamp(0))
    session.execute(
        note.on_conflict_do_update(
            index_elements=[Upload.object_key], set_={"started_at": Upload.started_at}
        )
    )


def are_left_behind(session: Session, *, older_than_s: float) -> bool:
    """Tell whether there is anything for `left_behind`."""
    query = select(Upload.object_key).where(_is_old(older_than_s)).limit(1)
    return session.scalar(query) is not None


def left_behind(session: Session, *, older_than_s: float) -> str | None:
    """Find a key whose upload began that long ago, and lock its note until commit; None if none.

    The caller deletes the object, then calls `end`. Notes of keys that an artifact or a file names
    after all, such as a second delivery's, are deleted on the way. The transaction may stay idle
    while the object store takes its time.
    """
    session.execute(text("SET LOCAL idle_in_transaction_session_timeout = '120s'"))
    query = (
        select(Upload.object_key)
        .where(_is_old(older_than_s))
        .order_by(Upload.started_at)
        .limit(1)
        .with_for_update(skip_locked=True)
    )
    while (key := session.scalar(query)) is not None:
        if not _is_named(session, key):
            return key
        end(session, key)
    return None


def _is_named(session: Session, object_key: str) -> bool:
    """Tell whether an artifact or a file that is not erased names the object."""
    for kind in (Artifact, File):
        query = select(kind.id).where(kind.object_key == object_key, kind.erased_at.is_(None))
        if session.scalar(query.limit(1)) is not None:
            return True
    return False


def _is_old(older_than_s: float) -> ColumnElement[bool]:
    return Upload.started_at < statement_time() - func.make_interval(0, 0, 0, 0, 0, 0, older_than_s)
