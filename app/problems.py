"""Define every refusal of the API: RFC 9457 problem details, with OpenAI's `error` object added.

Problem
├── MalformedBody         400   not JSON at all
├── ModerationBlocked     400   the safety rules refused the request
├── NotOffered            400   a feature of OpenAI's interface that this gateway lacks
├── Unauthenticated       401   no live API key
├── Forbidden             403   the key's scopes, or the tenant's tiers and models, do not allow it
├── LinkExpired           403   a link to one image has expired, or was never ours
├── NotFound              404   no such route
├── JobNotFound           404   also for another tenant's job: existence is private
├── ImageNotFound         404   the job has no such image
├── FileNotFound          404   also for another tenant's file
├── WebhookNotFound       404   also for another tenant's endpoint
├── DeliveryNotFound      404   also for another tenant's delivery
├── TenantNotFound        404   (admin)
├── KeyNotFound           404   (admin)
├── ModelNotFound         404
├── MethodNotAllowed      405
├── RequestTimeout        408   the body did not come in time
├── ImageNotReady         409   with Retry-After while it may still come
├── JobAlreadyFinished    409   the cancel came too late
├── ReplayImpossible      409   the job's parameters, or what they need, are gone
├── FileInUse             409   an unfinished job starts from it
├── TenantExists          409   (admin) the name is taken
├── StorageQuotaExceeded  409   the tenant's pictures use all the storage that it may use
├── Erased                410   its tenant deleted it
├── BodyTooLarge          413
├── UnsupportedMediaType  415
├── RangeNotSatisfiable   416   the picture is shorter than the requested part
├── InvalidImageRequest   422   no worker could ever render this; `errors` points at each field
├── InvalidRequest        422   wrong fields in any other body
├── InvalidPicture        422   the upload is no picture that can be used
├── InvalidQuery          422   a wrong query parameter or header
├── IdempotencyKeyReused  422   the key came before with another body
├── RateLimited           429   with Retry-After: too many requests in this minute
├── BudgetSpent           429   with Retry-After: megapixel-steps, until the budget has refilled
├── TooManyJobs           429   with Retry-After: unfinished jobs of this tenant
├── QuotaExceeded         429   with Retry-After: megapixel-steps of this day or month
├── TenantQueueFull       429   with Retry-After: too much work of this tenant waits in the tier
├── Unexpected            500   reveals nothing of our internals
├── JobFailed             500   an image call whose job failed on our side
├── MethodUnknown         501   no method of HTTP
├── PartUnavailable       503   with Retry-After: the database, store or another part is away
├── StreamsExhausted      503   with Retry-After: too many event streams in this process
├── WaitsExhausted        503   with Retry-After: too many waiting image calls in this process
├── UploadsExhausted      503   with Retry-After: too many uploads, or no disk space for them
├── FleetSaturated        503   with Retry-After: the job would not start in time
├── ModelUnserved         503   with Retry-After: no worker has the model, and none will start
├── JobExpired            503   with Retry-After: no worker started an image call's job in time
└── JobUnfinished         504   with Retry-After: an image call has waited as long as it may
"""

from collections.abc import Mapping
from typing import Any, Self, Unpack

from app.schemas import problems as schemas
from app.schemas.problems import FieldError, ProblemFacts
from policy.catalog import InvalidWish

MOST_NAMED = 5  # wrong fields in OpenAI's one message
_OPENAI_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Problem(Exception):
    """One refusal: `title` and `about` are constant per type, `detail` tells this occurrence.

    Further facts are members of their own, those of `schemas.ProblemFacts`. `title`, `about` and
    `detail` are served: they are written for users of the API.
    """

    slug, title, status = "unexpected", "Unexpected error", 500
    openai_type = ""  # "": the type for its status
    about = ""

    def __init__(
        self,
        detail: str,
        *,
        retry_after_s: int | None = None,
        **members: Unpack[ProblemFacts],
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.members = members

    @classmethod
    def at(
        cls,
        field: str,
        detail: str,
        *,
        accepted: object = None,
        sentence: str | None = None,
    ) -> Self:
        """Refuse what one field says.

        field: its name, or the way to it, as adapters/0; empty: the whole body.  detail: what is
        wrong with it, as `must be text`.  accepted: what would do; None: nobody can say.
        sentence: the problem's own detail, where that is not field and detail together.
        """
        entry: FieldError = {"pointer": f"/{field}", "detail": detail}
        if accepted is not None:
            entry["accepted"] = accepted
        return cls(sentence or f"{field or 'The body'} {detail}.", errors=[entry])

    def headers(self) -> dict[str, str]:
        """Return the headers that belong to the answer."""
        headers = {"Cache-Control": "no-store"}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        elif self.status in (409, 429):
            headers["X-Should-Retry"] = "false"  # OpenAI's clients would retry, to no avail
        if self.status == 401:
            headers["WWW-Authenticate"] = 'Bearer realm="darkroom"'
        return headers

    def summary(self) -> schemas.ProblemSummary:
        """Return it as a part of an answer that is about more than this problem."""
        return schemas.ProblemSummary(
            type=f"/problems/{self.slug}",
            title=self.title,
            status=self.status,
            detail=self.detail,
            **self.members,
        )

    def openai_error(self) -> schemas.OpenAIError:
        """Return OpenAI's `error` object: its clients take message, param and code from there."""
        otherwise = "server_error" if self.status >= 500 else "invalid_request_error"
        return schemas.OpenAIError(
            message=self._message(),
            type=self.openai_type or _OPENAI_TYPES.get(self.status, otherwise),
            param=self._param(),
            code=self.slug.replace("-", "_"),
        )

    def _message(self) -> str:
        """Return the detail, followed by the wrong fields that it does not name.

        Each of these is followed by the values that would be accepted.
        """
        errors = self.members.get("errors") or ()
        named = [error for error in errors if error["detail"] not in self.detail]
        fields = [
            f"{_field(error)}: {error['detail']}{_accepted(error.get('accepted'))}"
            for error in named[:MOST_NAMED]
        ]
        more = [f"and {len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
        return f"{self.detail} {'; '.join([*fields, *more])}." if named else self.detail

    def _param(self) -> str | None:
        errors = self.members.get("errors")
        if errors:
            return _field(errors[0])
        return self.members.get("parameter") or self.members.get("header")


def _field(error: Mapping[str, Any]) -> str:
    """Convert a JSON pointer to the dotted name that OpenAI uses."""
    return str(error["pointer"]).removeprefix("/").replace("/", ".")


def _accepted(accepted: Any) -> str:
    """Say in words which values would be accepted."""
    if isinstance(accepted, Mapping):
        return f" ({', '.join(f'{name} {value}' for name, value in accepted.items())})"
    if isinstance(accepted, list | tuple) and accepted:
        return f" (accepted: {', '.join(map(str, accepted))})"
    return ""


class MalformedBody(Problem):
    slug, title, status = "malformed-body", "Malformed body", 400
    about = "The body is not what its content type says."


class ModerationBlocked(Problem):
    slug, title, status = "moderation-blocked", "Moderation blocked", 400
    openai_type = "image_generation_user_error"
    about = "The safety rules refuse the request or what came of it; so will they the next time."


class NotOffered(Problem):
    slug, title, status = "not-offered", "Not offered", 400
    about = "OpenAI's interface has it, and this one has not; `detail` says what to ask for."


class Unauthenticated(Problem):
    slug, title, status = "unauthenticated", "Unauthenticated", 401
    about = "A live API key is needed: `Authorization: Bearer dr_…`."


class Forbidden(Problem):
    slug, title, status = "forbidden", "Forbidden", 403
    about = "The key is live, and neither its scopes nor its tenant's limits allow this."


class LinkExpired(Problem):
    slug, title, status = "link-expired", "Link expired", 403
    about = "A link to an image holds for a while; its URL under /v1, with a key, always does."


class NotFound(Problem):
    slug, title, status = "not-found", "Not found", 404
    about = "There is no such route here."


class JobNotFound(Problem):
    slug, title, status = "job-not-found", "Job not found", 404
    about = "No job of this tenant has that id."


class ImageNotFound(Problem):
    slug, title, status = "image-not-found", "Image not found", 404
    about = "The job has no image of that index."


class FileNotFound(Problem):
    slug, title, status = "file-not-found", "File not found", 404
    about = "No picture of this tenant has that id."


class WebhookNotFound(Problem):
    slug, title, status = "webhook-not-found", "Webhook not found", 404
    about = "No webhook endpoint of this tenant has that id."


class DeliveryNotFound(Problem):
    slug, title, status = "delivery-not-found", "Delivery not found", 404
    about = "No delivery of this tenant's webhooks has that id."


class TenantNotFound(Problem):
    slug, title, status = "tenant-not-found", "Tenant not found", 404
    about = "There is no such tenant."


class KeyNotFound(Problem):
    slug, title, status = "key-not-found", "Key not found", 404
    about = "There is no such live key."


class ModelNotFound(Problem):
    slug, title, status = "model-not-found", "Model not found", 404
    about = "No model has that name, or your tenant may not use it; `accepted` lists those it may."


class MethodNotAllowed(Problem):
    slug, title, status = "method-not-allowed", "Method not allowed", 405
    about = "The route exists; `Allow` says for which methods."


class RequestTimeout(Problem):
    slug, title, status = "request-timeout", "Request timeout", 408
    about = "The body did not come in time; send it again over a connection that keeps up."


class MethodUnknown(Problem):
    slug, title, status = "method-unknown", "Method unknown", 501
    about = "The request's method is none that any route here knows."


class ImageNotReady(Problem):
    slug, title, status = "image-not-ready", "Image not ready", 409
    about = "The image is not stored; waiting helps only while the job is active."


class JobAlreadyFinished(Problem):
    slug, title, status = "job-already-finished", "Job already finished", 409
    about = "The job reached another final state before the cancel."


class ReplayImpossible(Problem):
    slug, title, status = "replay-impossible", "Replay impossible", 409
    about = "What the job needs is gone: its parameters, a picture, or the version of its model."


class FileInUse(Problem):
    slug, title, status = "file-in-use", "File in use", 409
    about = "A job that is not finished starts from this picture; wait for it or cancel it."


class TenantExists(Problem):
    slug, title, status = "tenant-exists", "Tenant exists", 409
    about = "Another tenant has that name."


class StorageQuotaExceeded(Problem):
    slug, title, status = "storage-quota-exceeded", "Storage quota exceeded", 409
    openai_type = "insufficient_quota"
    about = "The tenant's pictures take as many bytes as they may; delete some."


class Erased(Problem):
    slug, title, status = "erased", "Erased", 410
    about = "It was there, and the tenant had it deleted; the audit log still says that it was."


class BodyTooLarge(Problem):
    slug, title, status = "body-too-large", "Body too large", 413
    about = "The body is larger than this installation takes; `detail` says how large it may be."


class UnsupportedMediaType(Problem):
    slug, title, status = "unsupported-media-type", "Unsupported media type", 415
    about = "Send JSON as application/json."


class RangeNotSatisfiable(Problem):
    slug, title, status = "range-not-satisfiable", "Range not satisfiable", 416
    about = "The picture has no such bytes; `size_bytes` says how many it has."

    def headers(self) -> dict[str, str]:
        """Return the headers, with the picture's size in Content-Range."""
        return {**super().headers(), "Content-Range": f"bytes */{self.members['size_bytes']}"}


class InvalidImageRequest(Problem):
    slug, title, status = "invalid-image-request", "Invalid image request", 422
    about = "No worker could ever render this; `errors` points at each wrong field."


class InvalidRequest(Problem):
    slug, title, status = "invalid-request", "Invalid request", 422
    about = "Fields cannot be used; `errors` points at each, and says what would be accepted."


class InvalidPicture(Problem):
    slug, title, status = "invalid-picture", "Invalid picture", 422
    about = "It is no picture that can be used; `detail` says why, `accepted` what could be."


class InvalidQuery(Problem):
    slug, title, status = "invalid-query", "Invalid query", 422
    about = "A query parameter or header cannot be used; `accepted` says what could be."


class IdempotencyKeyReused(Problem):
    slug, title, status = "idempotency-key-reused", "Idempotency key reused", 422
    about = "The key came before with another request; send a new key with a new request."


class RateLimited(Problem):
    slug, title, status = "rate-limited", "Rate limited", 429
    about = "The tenant's requests of the last minute are as many as it may send; waiting helps."


class BudgetSpent(Problem):
    slug, title, status = "budget-spent", "Budget spent", 429
    about = "The tenant's budget of megapixel-steps is spent; it fills again by itself."


class TooManyJobs(Problem):
    slug, title, status = "too-many-jobs", "Too many jobs", 429
    about = "As many jobs of the tenant are under way as may be; wait until one has ended."


class QuotaExceeded(Problem):
    slug, title, status = "quota-exceeded", "Quota exceeded", 429
    openai_type = "insufficient_quota"
    about = "The tenant's quota of megapixel-steps for this day or month is used up."


class TenantQueueFull(Problem):
    slug, title, status = "tenant-queue-full", "Tenant queue full", 429
    about = "As much work of the tenant's waits in this tier as may wait; waiting helps."


class StreamsExhausted(Problem):
    slug, title, status = "streams-exhausted", "Streams exhausted", 503
    about = "As many event streams are open here as may be; try again in a moment."


class WaitsExhausted(Problem):
    slug, title, status = "waits-exhausted", "Waits exhausted", 503
    about = "As many calls wait here as may. No job was made: ask again, or POST /v1/jobs and look."


class UploadsExhausted(Problem):
    slug, title, status = "uploads-exhausted", "Uploads exhausted", 503
    about = "As many large bodies come in here as may; try again in a moment."


class FleetSaturated(Problem):
    slug, title, status = "fleet-saturated", "Fleet saturated", 503
    about = "More is asked of the workers than they can begin in time; waiting helps."


class ModelUnserved(Problem):
    slug, title, status = "model-unserved", "Model unserved", 503
    about = "No worker holds the model and none is to come; an operator has to start one."


class Unexpected(Problem):
    slug, title, status = "unexpected", "Unexpected error", 500
    about = "A fault of ours; the request id finds it in the logs."


class JobFailed(Problem):
    slug, title, status = "job-failed", "Job failed", 500
    about = "The job behind this call failed, and not by what was asked for; `job_id` finds it."


class JobExpired(Problem):
    slug, title, status = "job-expired", "Job expired", 503
    about = "The job was not begun before its start deadline; waiting helps."


class JobUnfinished(Problem):
    slug, title, status = "job-unfinished", "Job unfinished", 504
    about = "The job goes on: the same request, tried again, waits for it."


class PartUnavailable(Problem):
    slug, title, status = "part-unavailable", "Part unavailable", 503
    about = "Something the answer needs is away; the same request will do later."


def invalid_wish(error: InvalidWish) -> InvalidImageRequest:
    """Make the problem of a field that is of the right type and out of range."""
    return InvalidImageRequest.at(error.field, error.detail, accepted=error.accepted)
