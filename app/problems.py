"""Every refusal the API can utter, as RFC 9457 problem details with OpenAI's `error` object beside them.

Problem
├── MalformedBody         400   not JSON at all
├── ModerationBlocked     400   the safety rules said no
├── NotOffered            400   asked for in OpenAI's words, and nothing here does it
├── Unauthenticated       401   no live API key
├── Forbidden             403   the key's scopes, or the tenant's tiers and models, do not reach that far
├── LinkExpired           403   a link to one image that is over, or was never ours
├── NotFound              404   no such route
├── JobNotFound           404   also for another tenant's job: existence is private
├── ImageNotFound         404   the job has no such image
├── FileNotFound          404   the same for pictures that tenants bring
├── WebhookNotFound       404   and for endpoints
├── DeliveryNotFound      404   and for what was sent to them
├── TenantNotFound        404   (admin)
├── KeyNotFound           404   (admin)
├── ModelNotFound         404
├── MethodNotAllowed      405
├── RequestTimeout        408   the body did not come in time
├── ImageNotReady         409   with Retry-After while it may still come
├── JobAlreadyFinished    409   the cancel came too late
├── ReplayImpossible      409   its parameters, or what they need, are gone
├── FileInUse             409   a job under way starts from it
├── TenantExists          409   (admin) the name is taken
├── StorageQuotaExceeded  409   the tenant's pictures take as much room as they may
├── Erased                410   the tenant had it deleted
├── BodyTooLarge          413
├── UnsupportedMediaType  415
├── RangeNotSatisfiable   416   the picture is shorter than the part that is asked for
├── InvalidImageRequest   422   no worker could ever render this; `errors` points at each field
├── InvalidRequest        422   the same for bodies that ask for no image
├── InvalidPicture        422   the upload is no picture that can be used
├── InvalidQuery          422   the same for query parameters and headers
├── IdempotencyKeyReused  422   the key came before with another body
├── RateLimited           429   with Retry-After: requests of this minute
├── BudgetSpent           429   with Retry-After: megapixel-steps, until the budget has filled again
├── TooManyJobs           429   with Retry-After: of this tenant at once
├── QuotaExceeded         429   with Retry-After: megapixel-steps of this day or month
├── TenantQueueFull       429   with Retry-After: this tenant has enough waiting in the tier
├── Unexpected            500   says nothing of our insides
├── JobFailed             500   an image call whose job failed on our side
├── MethodUnknown         501   no method of HTTP
├── PartUnavailable       503   with Retry-After
├── StreamsExhausted      503   with Retry-After: this process has as many event streams open as it may
├── WaitsExhausted        503   with Retry-After: and as many image calls that wait
├── UploadsExhausted      503   with Retry-After: and as many uploads, or no room for them
├── FleetSaturated        503   with Retry-After: it would not start in time
├── ModelUnserved         503   with Retry-After: no worker has the model, and none is to come
├── JobExpired            503   with Retry-After: an image call whose job nothing started in time
└── JobUnfinished         504   with Retry-After: an image call that waited as long as it may
"""

from collections.abc import Mapping
from typing import Any

import structlog
from flask import Flask, Response, g, json
from sqlalchemy.exc import OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from werkzeug.exceptions import ClientDisconnected, HTTPException

from models.database import conflict

log = structlog.get_logger(__name__)

MOST_NAMED = 5  # wrong fields in one sentence


class Problem(Exception):
    """One refusal: `title` is constant per type, `detail` tells this occurrence, further facts are members of their own."""

    slug, title, status = "unexpected", "Unexpected error", 500
    openai_type = ""  # "": what its status stands for

    def __init__(self, detail: str, *, retry_after_s: int | None = None, **members: Any) -> None:
        super().__init__(detail)
        self.detail, self.retry_after_s, self.members = detail, retry_after_s, members

    def response(self) -> Response:
        """The application/problem+json answer."""
        body = {**self.summary(), "instance": f"/requests/{g.get('request_id', 'unknown')}", "error": self.openai_error()}
        response = Response(json.dumps(body), self.status, content_type="application/problem+json")
        response.headers["Cache-Control"] = "no-store"
        if self.retry_after_s is not None:
            response.headers["Retry-After"] = str(self.retry_after_s)
        elif self.status in (409, 429):
            response.headers["X-Should-Retry"] = "false"  # OpenAI's clients would, and it would not help
        if self.status == 401:
            response.headers["WWW-Authenticate"] = 'Bearer realm="darkroom"'
        return response

    def summary(self) -> dict[str, Any]:
        """What an answer says of it that is about more than this problem."""
        return {"type": f"/problems/{self.slug}", "title": self.title, "status": self.status, "detail": self.detail, **self.members}

    def openai_error(self) -> dict[str, Any]:
        """The same in OpenAI's words: its clients take message, param and code from here."""
        by_status = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = self.openai_type or by_status.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"message": self._message(), "type": kind, "param": self._param(), "code": self.slug.replace("-", "_")}

    def _message(self) -> str:
        """The detail, and the wrong fields that it does not name, each with what would be accepted."""
        named = [error for error in self.members.get("errors") or () if error["detail"] not in self.detail]
        fields = [f"{_field(error)}: {error['detail']}{_accepted(error.get('accepted'))}" for error in named[:MOST_NAMED]]
        more = [f"and {len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
        return f"{self.detail} {'; '.join([*fields, *more])}." if named else self.detail

    def _param(self) -> str | None:
        errors = self.members.get("errors")
        if errors:
            return _field(errors[0])
        return self.members.get("parameter") or self.members.get("header")


def _field(error: Mapping[str, Any]) -> str:
    """A pointer, as OpenAI writes it."""
    return str(error["pointer"]).removeprefix("/").replace("/", ".")


def _accepted(accepted: Any) -> str:
    """What an error says would be accepted, in words."""
    if isinstance(accepted, Mapping):
        return f" ({', '.join(f'{name} {value}' for name, value in accepted.items())})"
    return f" (accepted: {', '.join(map(str, accepted))})" if isinstance(accepted, list | tuple) and accepted else ""


class MalformedBody(Problem):
    """The body is not what its content type says."""

    slug, title, status = "malformed-body", "Malformed body", 400


class ModerationBlocked(Problem):
    """The safety rules refuse the request or what came of it; the same words will be refused again."""

    slug, title, status = "moderation-blocked", "Moderation blocked", 400
    openai_type = "image_generation_user_error"


class NotOffered(Problem):
    """OpenAI's interface has it and this installation does not; `detail` says what could be asked for instead."""

    slug, title, status = "not-offered", "Not offered", 400


class Unauthenticated(Problem):
    """A live API key is needed: Authorization: Bearer dr_…"""

    slug, title, status = "unauthenticated", "Unauthenticated", 401


class Forbidden(Problem):
    """The key is live and may not do this: it lacks the scope, or its tenant is not allowed the tier or model."""

    slug, title, status = "forbidden", "Forbidden", 403


class LinkExpired(Problem):
    """A link to an image holds for a while; GET /v1/jobs/{job_id}/images/{index} with a key always leads there."""

    slug, title, status = "link-expired", "Link expired", 403


class NotFound(Problem):
    """No such route."""

    slug, title, status = "not-found", "Not found", 404


class JobNotFound(Problem):
    """No job of this tenant has that id."""

    slug, title, status = "job-not-found", "Job not found", 404


class ImageNotFound(Problem):
    """The job has no image of that index."""

    slug, title, status = "image-not-found", "Image not found", 404


class FileNotFound(Problem):
    """No picture of this tenant has that id."""

    slug, title, status = "file-not-found", "File not found", 404


class WebhookNotFound(Problem):
    """No webhook endpoint of this tenant has that id."""

    slug, title, status = "webhook-not-found", "Webhook not found", 404


class DeliveryNotFound(Problem):
    """No delivery of this tenant's webhooks has that id."""

    slug, title, status = "delivery-not-found", "Delivery not found", 404


class TenantNotFound(Problem):
    """There is no such tenant."""

    slug, title, status = "tenant-not-found", "Tenant not found", 404


class KeyNotFound(Problem):
    """There is no such live key."""

    slug, title, status = "key-not-found", "Key not found", 404


class ModelNotFound(Problem):
    """fleet.toml has no such model."""

    slug, title, status = "model-not-found", "Model not found", 404


class MethodNotAllowed(Problem):
    """The route exists; `Allow` says for which methods."""

    slug, title, status = "method-not-allowed", "Method not allowed", 405


class RequestTimeout(Problem):
    """The body did not come in time, or stopped coming; send it again over a connection that keeps up."""

    slug, title, status = "request-timeout", "Request timeout", 408


class MethodUnknown(Problem):
    """The request's method is none that any route here knows."""

    slug, title, status = "method-unknown", "Method unknown", 501


class ImageNotReady(Problem):
    """The image is not stored; waiting helps only while the job is active."""

    slug, title, status = "image-not-ready", "Image not ready", 409


class JobAlreadyFinished(Problem):
    """The job reached another final state before the cancel."""

    slug, title, status = "job-already-finished", "Job already finished", 409


class ReplayImpossible(Problem):
    """What the job's parameters need is gone: they were erased, a picture was, or the model version is not in fleet.toml any more."""

    slug, title, status = "replay-impossible", "Replay impossible", 409


class FileInUse(Problem):
    """A job that is not finished starts from this picture; wait for it or cancel it."""

    slug, title, status = "file-in-use", "File in use", 409


class TenantExists(Problem):
    """Another tenant has that name."""

    slug, title, status = "tenant-exists", "Tenant exists", 409


class StorageQuotaExceeded(Problem):
    """The pictures that the tenant has stored take as many bytes as they may; delete some, waiting does not help."""

    slug, title, status = "storage-quota-exceeded", "Storage quota exceeded", 409
    openai_type = "insufficient_quota"


class Erased(Problem):
    """It was there, and the tenant had it deleted; the audit log still says that it was."""

    slug, title, status = "erased", "Erased", 410


class BodyTooLarge(Problem):
    """The body is larger than MAX_BODY_BYTES, or a batch than MAX_BATCH_BYTES."""

    slug, title, status = "body-too-large", "Body too large", 413


class UnsupportedMediaType(Problem):
    """Send JSON as application/json."""

    slug, title, status = "unsupported-media-type", "Unsupported media type", 415


class RangeNotSatisfiable(Problem):
    """The picture has no such bytes; `size_bytes` says how many it has."""

    slug, title, status = "range-not-satisfiable", "Range not satisfiable", 416

    def response(self) -> Response:
        """With the size where HTTP has it."""
        response = super().response()
        response.headers["Content-Range"] = f"bytes */{self.members['size_bytes']}"
        return response


class InvalidImageRequest(Problem):
    """Fields that no worker could ever render; `errors` has a pointer, a detail and what is accepted for each."""

    slug, title, status = "invalid-image-request", "Invalid image request", 422


class InvalidRequest(Problem):
    """Fields that cannot be used; `errors` has a pointer, a detail and what is accepted for each."""

    slug, title, status = "invalid-request", "Invalid request", 422


class InvalidPicture(Problem):
    """The upload is not a picture that can be used; `detail` says why, `accepted` what could be."""

    slug, title, status = "invalid-picture", "Invalid picture", 422


class InvalidQuery(Problem):
    """A query parameter or header that cannot be used; the member `accepted` says what could be."""

    slug, title, status = "invalid-query", "Invalid query", 422


class IdempotencyKeyReused(Problem):
    """The Idempotency-Key came before with another body; send a new key with a new request."""

    slug, title, status = "idempotency-key-reused", "Idempotency key reused", 422


class RateLimited(Problem):
    """The tenant's requests of the last minute are as many as it may send; waiting helps."""

    slug, title, status = "rate-limited", "Rate limited", 429


class BudgetSpent(Problem):
    """The tenant's budget of megapixel-steps is spent; it fills again by itself."""

    slug, title, status = "budget-spent", "Budget spent", 429


class TooManyJobs(Problem):
    """As many jobs of the tenant are under way as may be; the next one fits when one of them has ended."""

    slug, title, status = "too-many-jobs", "Too many jobs", 429


class QuotaExceeded(Problem):
    """The tenant's quota of megapixel-steps for this day or month is used up."""

    slug, title, status = "quota-exceeded", "Quota exceeded", 429
    openai_type = "insufficient_quota"


class TenantQueueFull(Problem):
    """The tenant's own jobs in this tier wait for as much device time as may wait; waiting helps."""

    slug, title, status = "tenant-queue-full", "Tenant queue full", 429


class StreamsExhausted(Problem):
    """This gateway process has as many event streams open as it may; another one, or a moment later, will do."""

    slug, title, status = "streams-exhausted", "Streams exhausted", 503


class WaitsExhausted(Problem):
    """This gateway process has as many clients waiting as it may; no job was made. Ask again in a moment, or POST /v1/jobs and look."""

    slug, title, status = "waits-exhausted", "Waits exhausted", 503


class UploadsExhausted(Problem):
    """This gateway process has as many large bodies coming in as it may, or no room left for them; a moment later will do."""

    slug, title, status = "uploads-exhausted", "Uploads exhausted", 503


class FleetSaturated(Problem):
    """More is asked of all workers together than they can begin in time; waiting helps, and so does a tier with a longer deadline."""

    slug, title, status = "fleet-saturated", "Fleet saturated", 503


class ModelUnserved(Problem):
    """No live worker holds the model and nothing starts one; an operator has to."""

    slug, title, status = "model-unserved", "Model unserved", 503


class Unexpected(Problem):
    """A fault of ours; the request id finds it in the logs."""

    slug, title, status = "unexpected", "Unexpected error", 500


class JobFailed(Problem):
    """The job behind this call failed, and not by what was asked for; `job_id` finds it."""

    slug, title, status = "job-failed", "Job failed", 500


class JobExpired(Problem):
    """The job behind this call was not begun before its start deadline; waiting helps, or a tier with a longer one."""

    slug, title, status = "job-expired", "Job expired", 503


class JobUnfinished(Problem):
    """The job behind this call goes on: the same request, tried again, waits for it, and GET /v1/jobs/{job_id} shows it."""

    slug, title, status = "job-unfinished", "Job unfinished", 504


class PartUnavailable(Problem):
    """Something the answer needs is away; the same request will do later."""

    slug, title, status = "part-unavailable", "Part unavailable", 503


_BY_STATUS = {kind.status: kind for kind in (MalformedBody, NotFound, MethodNotAllowed, BodyTooLarge, UnsupportedMediaType)}


def register(app: Flask) -> None:
    """Make every error of `app` a problem."""
    app.register_error_handler(Problem, lambda problem: problem.response())
    app.register_error_handler(HTTPException, _from_werkzeug)
    app.register_error_handler(ClientDisconnected, _body_not_there)
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


def _body_not_there(error: ClientDisconnected) -> Response:
    return RequestTimeout("The body did not come in time.").response()


def _database_away(error: Exception) -> Response:
    if (why := conflict(error)) is not None:  # every try of the transaction lost; the database itself is well
        log.warning("transaction_conflicts", why=why)
        return PartUnavailable("Too much is being changed here at once; the same request will do in a moment.", retry_after_s=1).response()
    log.warning("database_away", reason=type(error).__name__)
    return PartUnavailable("The database cannot be reached right now.", retry_after_s=2, part="database").response()


def _unexpected(error: Exception) -> Response:
    log.error("unexpected_error", exc_info=error)
    return Unexpected("Something went wrong on our side; quote the request id when you report it.").response()
