"""Turn every error of the gateway into a problem (RFC 9457), whatever raised it."""

import structlog
from flask import Flask, Response, g, json
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import ClientDisconnected, HTTPException
from werkzeug.wrappers import Response as BaseResponse

from app.problems import (
    BodyTooLarge,
    MalformedBody,
    MethodNotAllowed,
    NotFound,
    PartUnavailable,
    Problem,
    RequestTimeout,
    Unexpected,
    UnsupportedMediaType,
)
from app.schemas import problems as schemas
from models.database import conflict

log = structlog.get_logger(__name__)

_BY_STATUS = {
    kind.status: kind
    for kind in (MalformedBody, NotFound, MethodNotAllowed, BodyTooLarge, UnsupportedMediaType)
}


def respond(problem: Problem) -> Response:
    """Answer with a problem, as application/problem+json."""
    body = schemas.Problem(
        **problem.summary(),
        instance=f"/requests/{g.get('request_id', 'unknown')}",
        error=problem.openai_error(),
    )
    content_type = "application/problem+json"
    return Response(json.dumps(body), problem.status, problem.headers(), content_type=content_type)


def register(app: Flask) -> None:
    """Register handlers that turn every error of `app` into a problem."""
    app.register_error_handler(Problem, respond)
    app.register_error_handler(HTTPException, _from_werkzeug)
    app.register_error_handler(ClientDisconnected, _body_not_there)
    app.register_error_handler(OperationalError, _database_away)
    app.register_error_handler(PoolTimeout, _database_away)
    app.register_error_handler(Exception, _unexpected)
    app.add_url_rule("/problems/<slug>", view_func=explain, methods=["GET"])


def explain(slug: str) -> Response:
    """Answer GET of a problem's `type`: what the problem means."""
    for kind in Problem.__subclasses__():
        if kind.slug == slug:
            meant = schemas.ProblemType(
                type=f"/problems/{slug}",
                title=kind.title,
                status=kind.status,
                about=kind.about,
            )
            return Response(json.dumps(meant), content_type="application/json")
    raise NotFound(f"There is no problem type {slug[:64]!r}.")


def _from_werkzeug(error: HTTPException) -> BaseResponse:
    status = error.code or 500
    if 300 <= status < 400 and error.response is not None:
        return error.get_response()
    kind: type[Problem] | None = _BY_STATUS.get(status)
    if kind is None:
        kind = type(
            "HttpProblem",
            (Problem,),
            {"slug": f"http-{status}", "title": error.name, "status": status},
        )
    response = respond(kind(error.description or error.name))
    if allowed := getattr(error, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(allowed))
    return response


def _body_not_there(error: ClientDisconnected) -> Response:
    return respond(RequestTimeout("The body arrived too slowly."))


def _database_away(error: Exception) -> Response:
    if (why := conflict(error)) is not None:
        # Every try of the transaction met a conflict; the database itself works.
        log.warning("transaction_conflicts", why=why)
        detail = "Other requests are changing the same data. Send the request again in a moment."
        return respond(PartUnavailable(detail, retry_after_s=1))
    log.warning("database_away", reason=type(error).__name__)
    detail = "The database cannot be reached right now."
    return respond(PartUnavailable(detail, retry_after_s=2, part="database"))


def _unexpected(error: Exception) -> Response:
    log.error("unexpected_error", exc_info=error)
    detail = "An internal error occurred. Quote the request id when you report it."
    return respond(Unexpected(detail))
