"""Everything that can go wrong between a program and Darkroom.

DarkroomError
├── Unreachable        no answer to any try: wrong address, or the gateway is down; try later
├── ProblemError       the gateway refused, and says why (problem+json, RFC 9457)
├── UnexpectedAnswer   the answer is not of this API: a proxy or another service sent it
├── ImageNotStored     the image is not stored (yet): look at the job's state
├── DigestMismatch     the downloaded bytes are not those that were stored; trying again may help
├── WaitTimeout        the job was not finished in time; it goes on, so wait for it again
└── NotConfigured      the URL or the API key is missing; the message says how to set it
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

_MOST_FIELDS = 5  # in one line


class DarkroomError(Exception):
    """The base of all errors of this client."""


class Unreachable(DarkroomError):
    """No answer at all."""


@dataclass(frozen=True)
class FieldError:
    """One wrong field of a request.

    pointer: JSON pointer, such as "/steps".  accepted: the values that would be accepted, where the
    gateway says so.
    """

    pointer: str
    detail: str
    accepted: Any = None


class ProblemError(DarkroomError):
    """The gateway refused the request.

    `type` is the stable name of the reason; `title` and `detail` are for people.  retry_after_s:
    seconds after which the same request may be accepted; None where waiting does not help.
    """

    def __init__(
        self,
        *,
        status: int,
        type: str,
        title: str,
        detail: str = "",
        errors: tuple[FieldError, ...] = (),
        request_id: str | None = None,
        members: Mapping[str, Any] | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(_told(title, detail, errors))
        self.status = status
        self.type = type
        self.title = title
        self.detail = detail
        self.errors = errors
        self.request_id = request_id
        self.retry_after_s = retry_after_s
        self.members = dict(members or {})  # the whole document, further facts included

    @property
    def slug(self) -> str:
        """Return the last part of `type`, such as "fleet-saturated"."""
        return self.type.rpartition("/")[2]


def _told(title: str, detail: str, errors: tuple[FieldError, ...]) -> str:
    """Write the problem as one line of text.

    It has the title, the detail, and each wrong field that the detail does not name, with the
    values that would have been accepted.
    """
    text = f"{title}: {detail}" if detail else title
    fields = [
        f"{error.pointer}: {error.detail}{_accepted(error.accepted)}"
        for error in errors
        if error.detail not in text
    ]
    more = [f"and {len(fields) - _MOST_FIELDS} more"] if len(fields) > _MOST_FIELDS else []
    return " · ".join([text, *fields[:_MOST_FIELDS], *more])


def _accepted(accepted: Any) -> str:
    if isinstance(accepted, Mapping):
        return f" ({', '.join(f'{name} {value}' for name, value in accepted.items())})"
    return (
        f" (accepted: {', '.join(map(str, accepted))})"
        if isinstance(accepted, list | tuple) and accepted
        else ""
    )


class UnexpectedAnswer(DarkroomError):
    """The answer is not one of this API."""


class ImageNotStored(DarkroomError):
    """The image of the job is not stored."""


class DigestMismatch(DarkroomError):
    """The downloaded bytes are not those that were stored."""


class WaitTimeout(DarkroomError):
    """The job did not end in time; `job` is its last known state."""

    def __init__(self, message: str, job: Any) -> None:
        super().__init__(message)
        self.job = job


class NotConfigured(DarkroomError):
    """No address or no key was given, and the environment has none."""
