"""Pages of a list, newest first: `limit`, `cursor` and the link to the next page. A cursor is the id of the last row that was shown."""

import base64
import binascii
import uuid
from collections.abc import Sequence

from flask import Request, url_for

from app.problems import InvalidQuery

MAX_PAGE = 100


def read_limit(request: Request) -> int:
    """How many rows are asked for. Raises InvalidQuery."""
    text = request.args.get("limit", "20")
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= MAX_PAGE):
        raise InvalidQuery(f"limit must be a whole number from 1 to {MAX_PAGE}.", parameter="limit", accepted={"min": 1, "max": MAX_PAGE})
    return int(text)


def read_cursor(request: Request) -> uuid.UUID | None:
    """The row behind which the page begins; None for the first page. Raises InvalidQuery."""
    text = request.args.get("cursor")
    if text is None:
        return None
    try:
        return uuid.UUID(bytes=base64.b64decode(text + "==", altchars=b"-_", validate=True))
    except (ValueError, binascii.Error):
        raise InvalidQuery("cursor must be a next_cursor of an earlier answer.", parameter="cursor") from None


def next_page(request: Request, endpoint: str, ids: Sequence[uuid.UUID], limit: int) -> tuple[str | None, dict[str, str]]:
    """The cursor of the next page, None on the last one, and the `Link` to it. ids: of up to `limit` + 1 rows."""
    if len(ids) <= limit:
        return None, {}
    cursor = base64.urlsafe_b64encode(ids[limit - 1].bytes).decode().rstrip("=")
    said = {name: value for name, value in request.args.items() if not name.startswith("_")}  # those are url_for's own
    return cursor, {"Link": f'<{url_for(endpoint, **said | (request.view_args or {}) | {"cursor": cursor})}>; rel="next"'}
