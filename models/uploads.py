"""Objects on their way into the object store: noted before the upload, struck out by the commit that names their artifact.

So what a crash between the two left behind is found without listing the bucket. Keys are content-addressed: two jobs may upload
the same object, and the note of one is the note of both.
"""

from sqlalchemy import ColumnElement, delete, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from models.database import now_once
from models.tables import Artifact, Upload

ORPHAN_AFTER_S = 600.0  # no upload takes that long: its task is dead, or was told that the image is stored already


def begin(session: Session, object_key: str) -> None:
    """Note that the object is about to be stored. Waits for whoever is deleting it as an orphan right now."""
    row = {"started_at": func.clock_timestamp()}
    session.execute(insert(Upload).values(object_key=object_key, **row).on_conflict_do_update(index_elements=[Upload.object_key], set_=row))


def end(session: Session, object_key: str) -> None:
    """The object has its artifact, in this transaction."""
    session.execute(delete(Upload).where(Upload.object_key == object_key))


def are_left_behind(session: Session, *, older_than_s: float) -> bool:
    """Is there anything for `left_behind`?"""
    return session.scalar(select(Upload.object_key).where(_is_old(older_than_s)).limit(1)) is not None


def left_behind(session: Session, *, older_than_s: float, limit: int = 20) -> list[str]:
    """Keys whose upload began that long ago and that nobody struck out, locked until commit: delete the objects, then `end` them.

    A key that an artifact names after all, a doubled delivery's for one, is struck out and left out.
    """
    query = (
        select(Upload.object_key).where(_is_old(older_than_s)).order_by(Upload.started_at).limit(limit).with_for_update(skip_locked=True)
    )
    keys = list(session.scalars(query))
    named = set(session.scalars(select(Artifact.object_key).where(Artifact.object_key.in_(keys))))
    for key in named:
        end(session, key)
    return [key for key in keys if key not in named]


def _is_old(older_than_s: float) -> ColumnElement[bool]:
    return Upload.started_at < now_once() - func.make_interval(0, 0, 0, 0, 0, 0, older_than_s)
