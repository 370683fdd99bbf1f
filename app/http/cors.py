"""Allow web pages to call the gateway (CORS): those of CORS_ALLOWED_ORIGINS, by default none.

CORS credentials (cookies) are never allowed. A page sends its API key itself, in Authorization, so
allowing its origin gives it nothing that the key does not. Browsers send an OPTIONS request first,
without the key; it is answered for everybody, as is every other OPTIONS request.
"""

import re

from flask import Flask, Response, current_app, request

METHODS = "GET, HEAD, POST, PATCH, DELETE, OPTIONS"
# The headers that a page may read of an answer, beside those that CORS allows every page.
EXPOSED = (
    "Accept-Ranges, Content-Disposition, Content-Length, Content-Range, ETag, "
    "Idempotency-Replayed, Link, Location, Preference-Applied, RateLimit, RateLimit-Policy, "
    "Retry-After, X-Darkroom-Job-Id, X-Request-Id, X-Should-Retry"
)
ASKED_AGAIN_AFTER_S = 600
_HEADER_NAMES = re.compile(r"[A-Za-z0-9-]{1,64}(\s*,\s*[A-Za-z0-9-]{1,64}){0,63}")


def register(app: Flask, allowed_origins: str) -> None:
    """Answer every OPTIONS request of `app`, and let pages of these origins read its answers.

    allowed_origins: separated by commas.
    """
    origins = frozenset(filter(None, allowed_origins.split(",")))
    app.before_request(lambda: _answer_options(origins))
    if origins:
        app.after_request(lambda response: _tell_origin(origins, response))


def _answer_options(origins: frozenset[str]) -> Response | None:
    if request.method != "OPTIONS":
        return None
    is_preflight = (
        "Origin" in request.headers and "Access-Control-Request-Method" in request.headers
    )
    if request.routing_exception is not None and not (is_preflight and origins):
        return None  # 404; a page sees that status only in the request after its preflight
    response = Response(status=204)
    del response.headers["Content-Type"]
    response.headers["Allow"] = METHODS
    if request.routing_exception is None:
        routes = current_app.create_url_adapter(request)
        assert routes is not None  # a request always has an adapter
        response.headers["Allow"] = ", ".join(sorted(routes.allowed_methods()))
    if is_preflight and _allowed(origins) is not None:
        _permit(response)
    return response


def _tell_origin(origins: frozenset[str], response: Response) -> Response:
    if origins != {"*"}:
        # Also for requests without an Origin: a cache must not give their answer to a page.
        response.vary.add("Origin")
    allowed = _allowed(origins)
    if allowed is not None:
        response.headers["Access-Control-Allow-Origin"] = allowed
        response.headers["Access-Control-Expose-Headers"] = EXPOSED
    return response


def _allowed(origins: frozenset[str]) -> str | None:
    """Return the value of Access-Control-Allow-Origin for this request.

    None for an origin that is not allowed, and for a request without one.
    """
    origin = request.headers.get("Origin")
    if origin is None:
        return None
    return "*" if "*" in origins else origin if origin in origins else None


def _permit(response: Response) -> None:
    """Allow the request that this preflight announces, with any headers.

    That is safe because cookies are never allowed: no other header gives a page the user's rights.
    """
    response.headers["Access-Control-Allow-Methods"] = METHODS
    wanted = request.headers.get("Access-Control-Request-Headers", "").strip()
    if _HEADER_NAMES.fullmatch(wanted):
        response.headers["Access-Control-Allow-Headers"] = wanted
    response.headers["Access-Control-Max-Age"] = str(ASKED_AGAIN_AFTER_S)
    response.vary.update(("Access-Control-Request-Method", "Access-Control-Request-Headers"))
