"""Objects on their way into the object store, or out of it: noted before the upload, struck out by the commit that names them.

So what a crash between the two left behind is found without listing the bucket; what is given up
gets the same kind of note. Keys are content-addressed: a picture and two jobs' images may be the
same object, and the note of one is the note of all.
"""

from sqlalchemy import ColumnElement, delete, func, select, text
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from models.database import now_once
from models.tables import Artifact, File, Upload

# No upload takes that long: its task is dead, or was told that the image is stored already.
ORPHAN_AFTER_S = 600.0


def begin(session: Session, object_key: str) -> None:
    """Note that the object is about to be stored. Waits for whoever is deleting it as an orphan right now."""
    row = {"started_at": func.clock_timestamp()}
    session.execute(
        insert(Upload)
        .values(object_key=object_key, **row)
        .on_conflict_do_update(index_elements=[Upload.object_key], set_=row)
    )


def end(session: Session, object_key: str) -> None:
    """The object has its artifact or its file, in this transaction."""
    session.execute(delete(Upload).where(Upload.object_key == object_key))


def end_if_named(session: Session, object_key: str) -> None:
    """Strike out a note that was made for nothing: the object has its artifact or its file by another delivery of the same pixels.

    Left standing, it would look like an upload under way, and who gives the object up would have to
    wait for ORPHAN_AFTER_S.
    """
    note = select(Upload.object_key).where(Upload.object_key == object_key).with_for_update()
    if session.scalar(note) is not None and _is_named(session, object_key):
        end(session, object_key)


def give_up(session: Session, object_key: str) -> None:
    """The caller wants the object no more: `left_behind` is to find it at once, unless somebody is just storing it again.

    Waits for whoever is looking right now whether the object has a name: what it sees may be older
    than what the caller did.
    """
    note = insert(Upload).values(object_key=object_key, started_at=func.to_timestamp(0))
    session.execute(
        note.on_conflict_do_update(
            index_elements=[Upload.object_key], set_={"started_at": Upload.started_at}
        )
    )


def are_left_behind(session: Session, *, older_than_s: float) -> bool:
    """Is there anything for `left_behind`?"""
    return (
        session.scalar(select(Upload.object_key).where(_is_old(older_than_s)).limit(1)) is not None
    )


def left_behind(session: Session, *, older_than_s: float) -> str | None:
    """A key whose upload began that long ago and that nobody struck out, locked until commit: delete the object, then `end` it.

    Keys that an artifact or a file names after all, a doubled delivery's for one, are struck out on
    the way. None if there is no other. The transaction may stay idle while the object store takes
    its time.
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
    """By anything that is not erased."""
    return any(
        session.scalar(
            select(kind.id).where(kind.object_key == object_key, kind.erased_at.is_(None)).limit(1)
        )
        is not None
        for kind in (Artifact, File)
    )


def _is_old(older_than_s: float) -> ColumnElement[bool]:
    return Upload.started_at < now_once() - func.make_interval(0, 0, 0, 0, 0, 0, older_than_s)
