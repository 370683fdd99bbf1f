"""Page through a list, newest first: `limit`, `cursor` and the link to the next page.

A cursor is the id of the last row that was shown.
"""

import base64
import binascii
import uuid
from collections.abc import Sequence
from urllib.parse import urlencode

from flask import Request, url_for

from app.problems import InvalidQuery

MAX_PAGE = 100  # rows
DEFAULT_PAGE = 20  # rows


def read_limit(request: Request) -> int:
    """Read the page size. Raises InvalidQuery."""
    return parse_limit(_once(request, "limit") or str(DEFAULT_PAGE))


def parse_limit(text: str) -> int:
    """Parse a page size. Raises InvalidQuery."""
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_PAGE):
        raise InvalidQuery(
            f"limit must be a whole number from 1 to {MAX_PAGE}.",
            parameter="limit",
            accepted={"min": 1, "max": MAX_PAGE},
        )
    return int(text)


def read_cursor(request: Request) -> uuid.UUID | None:
    """Read the id of the row behind which the page begins; None for the first page.

    Raises InvalidQuery.
    """
    text = _once(request, "cursor")
    return None if text is None else parse_cursor(text)


def parse_cursor(text: str) -> uuid.UUID:
    """Parse a cursor to the id of a row. Raises InvalidQuery."""
    try:
        return uuid.UUID(bytes=base64.b64decode(text + "==", altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        raise InvalidQuery(
            "cursor must be the next_cursor of an earlier answer.", parameter="cursor"
        ) from None


def _once(request: Request, parameter: str) -> str | None:
    values = request.args.getlist(parameter)
    if len(values) > 1:
        raise InvalidQuery(
            f"{parameter} is given {len(values)} times; give it once.", parameter=parameter
        )
    return values[0] if values else None


def cursor_of(row_id: uuid.UUID) -> str:
    """Return the cursor of the page that begins after this row."""
    return base64.urlsafe_b64encode(row_id.bytes).decode().rstrip("=")


def next_page(
    request: Request, ids: Sequence[uuid.UUID], limit: int, *, more_before: uuid.UUID | None = None
) -> tuple[str | None, dict[str, str]]:
    """Return the next page's cursor, None on the last page, and its `Link` header.

    ids: of up to `limit` + 1 rows. more_before: there is another page even if there are fewer ids,
    and it begins behind this id.
    """
    if len(ids) <= limit and more_before is None:
        return None, {}
    cursor = cursor_of(ids[limit - 1] if len(ids) > limit else more_before or ids[-1])
    said = {name: value for name, value in request.args.items() if name != "cursor"}
    # Not by url_for: it has parameters of its own, and clients choose these names.
    query = urlencode(said | {"cursor": cursor})
    path = url_for(str(request.endpoint), **request.view_args or {})
    return cursor, {"Link": f'<{path}?{query}>; rel="next"'}
