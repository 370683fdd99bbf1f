"""Answer with a document: JSON, status and headers."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar
from uuid import UUID

from flask import Request, Response

from app.http.pages import next_page
from app.schemas.base import Page, to_json

Row = TypeVar("Row")


def answer(shown: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Answer with a document of app/schemas as JSON."""
    return Response(to_json(shown), status, headers, content_type="application/json")


def answer_page(
    request: Request,
    kind: Callable[..., Page],
    rows: Sequence[Row],
    show: Callable[[Row], Any],
    *,
    limit: int,
    id_of: Callable[[Row], UUID],
    more_before: UUID | None = None,
) -> Response:
    """Answer with up to `limit` of the rows, and with a link to the next page.

    rows: `limit` + 1 of them where there are more. more_before: there is another page even if there
    are fewer rows, and it begins behind this id.
    """
    cursor, link = next_page(request, [id_of(row) for row in rows], limit, more_before=more_before)
    data = [show(row) for row in rows[:limit]]
    return answer(kind(data=data, has_more=cursor is not None, next_cursor=cursor), headers=link)


def whole_list(kind: Callable[..., Page], data: Sequence[Any]) -> Response:
    """Answer with a list that fits on one page."""
    return answer(kind(data=data, has_more=False, next_cursor=None))
