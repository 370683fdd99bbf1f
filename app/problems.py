"""Every refusal the API can utter, as RFC 9457 problem details.

Problem
├── MalformedBody         400   not JSON at all
├── Unauthenticated       401   no live API key
├── NotFound              404   no such route
├── JobNotFound           404   also for another tenant's job: existence is private
├── ImageNotFound         404   the job has no such image
├── ModelNotFound         404
├── MethodNotAllowed      405
├── ImageNotReady         409   with Retry-After while it may still come
├── JobAlreadyFinished    409   the cancel came too late
├── BodyTooLarge          413
├── UnsupportedMediaType  415
├── InvalidImageRequest   422   no worker could ever render this; `errors` points at each field
├── InvalidQuery          422   the same for query parameters and headers
├── TenantQueueFull       429   with Retry-After: this tenant has enough waiting in the tier
├── Unexpected            500   says nothing of our insides
├── PartUnavailable       503   with Retry-After
├── FleetSaturated        503   with Retry-After: it would not start in time
└── ModelUnserved         503   with Retry-After: no worker has the model, and none is to come
"""

from typing import Any

import structlog
from flask import Flask, Response, g, json
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import HTTPException

log = structlog.get_logger(__name__)


class Problem(Exception):
    """One refusal: `title` is constant per type, `detail` tells this occurrence, further facts are members of their own."""

    slug, title, status = "unexpected", "Unexpected error", 500

    def __init__(self, detail: str, *, retry_after_s: int | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.detail, self.retry_after_s, self.members = detail, retry_after_s, members

    def response(self) -> Response:
        """The application/problem+json answer."""
        head = {"type": f"/problems/{self.slug}", "title": self.title, "status": self.status, "detail": self.detail}
        body = {**head, "instance": f"/requests/{g.get('request_id', 'unknown')}", **self.members}
        response = Response(json.dumps(body), self.status, content_type="application/problem+json")
        response.headers["Cache-Control"] = "no-store"
        if self.retry_after_s is not None:
            response.headers["Retry-After"] = str(self.retry_after_s)
        if self.status == 401:
            response.headers["WWW-Authenticate"] = 'Bearer realm="darkroom"'
        return response


class MalformedBody(Problem):
    """The body is not what its content type says."""

    slug, title, status = "malformed-body", "Malformed body", 400


class Unauthenticated(Problem):
    """A live API key is needed: Authorization: Bearer dr_…"""

    slug, title, status = "unauthenticated", "Unauthenticated", 401


class NotFound(Problem):
    """No such route."""

    slug, title, status = "not-found", "Not found", 404


class JobNotFound(Problem):
    """No job of this tenant has that id."""

    slug, title, status = "job-not-found", "Job not found", 404


class ImageNotFound(Problem):
    """The job has no image of that index."""

    slug, title, status = "image-not-found", "Image not found", 404


class ModelNotFound(Problem):
    """fleet.toml has no such model."""

    slug, title, status = "model-not-found", "Model not found", 404


class MethodNotAllowed(Problem):
    """The route exists; `Allow` says for which methods."""

    slug, title, status = "method-not-allowed", "Method not allowed", 405


class ImageNotReady(Problem):
    """The image is not stored; waiting helps only while the job is active."""

    slug, title, status = "image-not-ready", "Image not ready", 409


class JobAlreadyFinished(Problem):
    """The job reached another final state before the cancel."""

    slug, title, status = "job-already-finished", "Job already finished", 409


class BodyTooLarge(Problem):
    """The body is larger than MAX_BODY_BYTES."""

    slug, title, status = "body-too-large", "Body too large", 413


class UnsupportedMediaType(Problem):
    """Send JSON as application/json."""

    slug, title, status = "unsupported-media-type", "Unsupported media type", 415


class InvalidImageRequest(Problem):
    """Fields that no worker could ever render; `errors` has a pointer, a detail and what is accepted for each."""

    slug, title, status = "invalid-image-request", "Invalid image request", 422


class InvalidQuery(Problem):
    """A query parameter or header that cannot be used; the member `accepted` says what could be."""

    slug, title, status = "invalid-query", "Invalid query", 422


class TenantQueueFull(Problem):
    """The tenant's own jobs in this tier wait for as much device time as may wait; waiting helps."""

    slug, title, status = "tenant-queue-full", "Tenant queue full", 429


class FleetSaturated(Problem):
    """More is asked of all workers together than they can begin in time; waiting helps, and so does a tier with a longer deadline."""

    slug, title, status = "fleet-saturated", "Fleet saturated", 503


class ModelUnserved(Problem):
    """No live worker holds the model and nothing starts one; an operator has to."""

    slug, title, status = "model-unserved", "Model unserved", 503


class Unexpected(Problem):
    """A fault of ours; the request id finds it in the logs."""

    slug, title, status = "unexpected", "Unexpected error", 500


class PartUnavailable(Problem):
    """Something the answer needs is away; the same request will do later."""

    slug, title, status = "part-unavailable", "Part unavailable", 503


_BY_STATUS = {kind.status: kind for kind in (MalformedBody, NotFound, MethodNotAllowed, BodyTooLarge, UnsupportedMediaType)}


def register(app: Flask) -> None:
    """Make every error of `app` a problem."""
    app.register_error_handler(Problem, Problem.response)
    app.register_error_handler(HTTPException, _from_werkzeug)
    app.register_error_handler(OperationalError, _database_away)
    app.register_error_handler(PoolTimeout, _database_away)
    app.register_error_handler(Exception, _unexpected)
    app.add_url_rule("/problems/<slug>", view_func=explain, methods=["GET"])


def explain(slug: str) -> Response:
    """What a problem's `type` leads to."""
    for kind in Problem.__subclasses__():
        if kind.slug == slug:
            about = {"type": f"/problems/{slug}", "title": kind.title, "status": kind.status, "about": kind.__doc__}
            return Response(json.dumps(about), content_type="application/json")
    raise NotFound(f"There is no problem {slug[:64]!r}.")


def _from_werkzeug(error: HTTPException) -> Response:
    status = error.code or 500
    if 300 <= status < 400 and error.response is not None:
        return error.get_response()
    kind = _BY_STATUS.get(status)
    if kind is None:
        kind = type("HttpProblem", (Problem,), {"slug": f"http-{status}", "title": error.name, "status": status})
    response = kind(error.description or error.name).response()
    if allowed := getattr(error, "valid_methods", None):
        response.headers["Allow"] = ", ".join(sorted(allowed))
    return response


def _database_away(error: Exception) -> Response:
    log.warning("database_away", reason=type(error).__name__)
    return PartUnavailable("The database cannot be reached right now.", retry_after_s=2, part="database").response()


def _unexpected(error: Exception) -> Response:
    log.error("unexpected_error", exc_info=error)
    return Unexpected("Something went wrong on our side; quote the request id when you report it.").response()
