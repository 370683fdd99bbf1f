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
├── RequestTimeout        408   the body arrived too slowly
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
├── IdempotencyKeyReused  422   the key was used for another request
├── RateLimited           429   with Retry-After: too many requests in this minute
├── BudgetSpent           429   with Retry-After: megapixel-steps, until the budget has refilled
├── TooManyJobs           429   with Retry-After: unfinished jobs of this tenant
├── QuotaExceeded         429   with Retry-After: megapixel-steps of this day or month
├── TenantQueueFull       429   with Retry-After: too much work of this tenant waits in the tier
├── Unexpected            500   reveals nothing of our internals
├── JobFailed             500   an image call whose job failed on our side
├── MethodUnknown         501   no method of HTTP
├── PartUnavailable       503   with Retry-After: the database, store or another part is down
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
from policy.refusals import InvalidParam

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
    about = "The body cannot be read as its content type; `detail` says why."


class ModerationBlocked(Problem):
    slug, title, status = "moderation-blocked", "Moderation blocked", 400
    openai_type = "image_generation_user_error"
    about = "The safety rules refused the request or its images; the same request is refused again."


class NotOffered(Problem):
    slug, title, status = "not-offered", "Not offered", 400
    about = (
        "OpenAI's API has this feature, but this gateway does not; `detail` says what it offers."
    )


class Unauthenticated(Problem):
    slug, title, status = "unauthenticated", "Unauthenticated", 401
    about = "The request needs a valid API key, as `Authorization: Bearer dr_…`."


class Forbidden(Problem):
    slug, title, status = "forbidden", "Forbidden", 403
    about = "The API key is valid, but its scopes or its tenant's limits do not allow this."


class LinkExpired(Problem):
    slug, title, status = "link-expired", "Link expired", 403
    about = "Links to images expire. Get a new one, or use the image's URL under /v1 with your key."


class NotFound(Problem):
    slug, title, status = "not-found", "Not found", 404
    about = "There is no such route."


class JobNotFound(Problem):
    slug, title, status = "job-not-found", "Job not found", 404
    about = "Your tenant has no job with this id."


class ImageNotFound(Problem):
    slug, title, status = "image-not-found", "Image not found", 404
    about = "The job has no image with this index."


class FileNotFound(Problem):
    slug, title, status = "file-not-found", "File not found", 404
    about = "Your tenant has no picture with this id."


class WebhookNotFound(Problem):
    slug, title, status = "webhook-not-found", "Webhook not found", 404
    about = "Your tenant has no webhook endpoint with this id."


class DeliveryNotFound(Problem):
    slug, title, status = "delivery-not-found", "Delivery not found", 404
    about = "Your tenant's webhooks have no delivery with this id."


class TenantNotFound(Problem):
    slug, title, status = "tenant-not-found", "Tenant not found", 404
    about = "There is no tenant with this id."


class KeyNotFound(Problem):
    slug, title, status = "key-not-found", "Key not found", 404
    about = "There is no key with this id that is still valid."


class ModelNotFound(Problem):
    slug, title, status = "model-not-found", "Model not found", 404
    about = "No model has this name, or your tenant may not use it; `accepted` lists models."


class MethodNotAllowed(Problem):
    slug, title, status = "method-not-allowed", "Method not allowed", 405
    about = "The route does not take this method; the header `Allow` lists those that it takes."


class RequestTimeout(Problem):
    slug, title, status = "request-timeout", "Request timeout", 408
    about = "The body arrived too slowly. Send it again over a faster connection."


class MethodUnknown(Problem):
    slug, title, status = "method-unknown", "Method unknown", 501
    about = "No route takes the method of this request."


class ImageNotReady(Problem):
    slug, title, status = "image-not-ready", "Image not ready", 409
    about = "The image is not stored. Waiting helps only if the job has not ended yet."


class JobAlreadyFinished(Problem):
    slug, title, status = "job-already-finished", "Job already finished", 409
    about = "The job had already ended when the cancel arrived."


class ReplayImpossible(Problem):
    slug, title, status = "replay-impossible", "Replay impossible", 409
    about = (
        "Something the job needs is gone: its parameters, a picture or its version of the model."
    )


class FileInUse(Problem):
    slug, title, status = "file-in-use", "File in use", 409
    about = "An unfinished job starts from this picture. Wait for the job or cancel it."


class TenantExists(Problem):
    slug, title, status = "tenant-exists", "Tenant exists", 409
    about = "Another tenant has this name."


class StorageQuotaExceeded(Problem):
    slug, title, status = "storage-quota-exceeded", "Storage quota exceeded", 409
    openai_type = "insufficient_quota"
    about = "Your tenant has no storage left for pictures. Delete some."


class Erased(Problem):
    slug, title, status = "erased", "Erased", 410
    about = "Your tenant has deleted it. Only its record in the audit log is left."


class BodyTooLarge(Problem):
    slug, title, status = "body-too-large", "Body too large", 413
    about = "The body is larger than this installation accepts; `detail` names the limit."


class UnsupportedMediaType(Problem):
    slug, title, status = "unsupported-media-type", "Unsupported media type", 415
    about = "The route does not take this content type; `detail` says which to send."


class RangeNotSatisfiable(Problem):
    slug, title, status = "range-not-satisfiable", "Range not satisfiable", 416
    about = "The range is not in the picture; `size_bytes` is the picture's size."

    def headers(self) -> dict[str, str]:
        """Return the headers, with the picture's size in Content-Range."""
        return {**super().headers(), "Content-Range": f"bytes */{self.members['size_bytes']}"}


class InvalidImageRequest(Problem):
    slug, title, status = "invalid-image-request", "Invalid image request", 422
    about = "The request cannot be served, now or later; `errors` lists each wrong field."


class InvalidRequest(Problem):
    slug, title, status = "invalid-request", "Invalid request", 422
    about = "Some fields are wrong; `errors` lists each, with the accepted values."


class InvalidPicture(Problem):
    slug, title, status = "invalid-picture", "Invalid picture", 422
    about = "The picture cannot be used: `detail` says why, `accepted` names the accepted formats."


class InvalidQuery(Problem):
    slug, title, status = "invalid-query", "Invalid query", 422
    about = "A query parameter or a header is wrong; `accepted` says what it may be."


class IdempotencyKeyReused(Problem):
    slug, title, status = "idempotency-key-reused", "Idempotency key reused", 422
    about = "The Idempotency-Key was used for another request. Use a new key for each new request."


class RateLimited(Problem):
    slug, title, status = "rate-limited", "Rate limited", 429
    about = "Your tenant has sent as many requests in this minute as it may. Wait and try again."


class BudgetSpent(Problem):
    slug, title, status = "budget-spent", "Budget spent", 429
    about = "Your tenant's budget of megapixel-steps is used up. It refills continuously: wait."


class TooManyJobs(Problem):
    slug, title, status = "too-many-jobs", "Too many jobs", 429
    about = "Your tenant has as many unfinished jobs as it may. Wait until one ends."


class QuotaExceeded(Problem):
    slug, title, status = "quota-exceeded", "Quota exceeded", 429
    openai_type = "insufficient_quota"
    about = "Your tenant's quota of megapixel-steps for this day or month would be exceeded."


class TenantQueueFull(Problem):
    slug, title, status = "tenant-queue-full", "Tenant queue full", 429
    about = "Your tenant has as much work waiting in this tier as it may. Wait and try again."


class StreamsExhausted(Problem):
    slug, title, status = "streams-exhausted", "Streams exhausted", 503
    about = "This process has no room for another event stream. Try again in a moment."


class WaitsExhausted(Problem):
    slug, title, status = "waits-exhausted", "Waits exhausted", 503
    about = "Too many calls wait for images. No job was created: try again, or use POST /v1/jobs."


class UploadsExhausted(Problem):
    slug, title, status = "uploads-exhausted", "Uploads exhausted", 503
    about = "This process receives too many large uploads at once. Try again in a moment."


class FleetSaturated(Problem):
    slug, title, status = "fleet-saturated", "Fleet saturated", 503
    about = "The workers have too much to do: the job would not start in time. Wait and try again."


class ModelUnserved(Problem):
    slug, title, status = "model-unserved", "Model unserved", 503
    about = "No worker serves this model. An operator has to start one."


class Unexpected(Problem):
    slug, title, status = "unexpected", "Unexpected error", 500
    about = "A fault in Darkroom. Give the request id to the operator, who finds it in the logs."


class JobFailed(Problem):
    slug, title, status = "job-failed", "Job failed", 500
    about = "The job of this call failed through no fault of the request. `job_id` names the job."


class JobExpired(Problem):
    slug, title, status = "job-expired", "Job expired", 503
    about = "No worker started the job before its deadline. Wait and try again."


class JobUnfinished(Problem):
    slug, title, status = "job-unfinished", "Job unfinished", 504
    about = "The job has not ended yet. Send the same request again to go on waiting for it."


class PartUnavailable(Problem):
    slug, title, status = "part-unavailable", "Part unavailable", 503
    about = "A part of the installation cannot be reached now. Try the same request again later."


def invalid_param(error: InvalidParam) -> InvalidImageRequest:
    """Make the problem of a field that is of the right type and out of range."""
    return InvalidImageRequest.at(error.field, error.detail, accepted=error.accepted)
