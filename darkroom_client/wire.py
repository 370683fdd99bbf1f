"""Build the API's requests as values. No I/O, so sync and async clients share them.

The answers are read in answers.py.
"""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import httpx

_LARGE_S = 90.0  # a thousand jobs, or a picture over a thin line
_HEARTBEATS_S = 15.0  # the gateway sends one every 10 s
_CONNECTED_IN_S = 10.0


@dataclass(frozen=True, kw_only=True)
class ApiRequest:
    """One request: what httpx.Client.request and httpx.AsyncClient.request take."""

    method: str
    path: str
    params: Mapping[str, Any] = field(default_factory=dict)
    json: Any = None
    file: tuple[str, bytes] | None = None  # name and content of an upload
    headers: Mapping[str, str] = field(default_factory=dict)
    held_s: float = 0.0  # how much longer than others it may take

    def arguments(self, timeout_s: float) -> dict[str, Any]:
        """Return the keyword arguments for httpx.

        timeout_s: seconds of silence that are allowed for an ordinary answer.
        """
        body: dict[str, Any] = {} if self.json is None else {"json": self.json}
        if self.file is not None:
            body["files"] = {"file": self.file}
        return {
            "method": self.method,
            "url": self.path,
            "params": dict(self.params),
            "headers": dict(self.headers),
            "timeout": httpx.Timeout(
                timeout_s + self.held_s, connect=min(timeout_s, _CONNECTED_IN_S)
            ),
            **body,
        }


def new_key() -> str:
    """Make a unique Idempotency-Key."""
    return uuid.uuid4().hex


def create_job(fields: Mapping[str, Any], key: str) -> ApiRequest:
    """Ask for a job. The gateway fills in what is None in `fields`.

    key: the same for the same request, however often it is sent.
    """
    return ApiRequest(method="POST", path="/v1/jobs", json=_said(fields), headers=_once(key))


def create_jobs(jobs: Sequence[Mapping[str, Any]], key: str) -> ApiRequest:
    """Ask for up to 1,000 jobs at once."""
    return ApiRequest(
        method="POST",
        path="/v1/jobs:batch",
        json={"jobs": [_said(fields) for fields in jobs]},
        headers=_once(key),
        held_s=_LARGE_S,
    )


def estimate(fields: Mapping[str, Any]) -> ApiRequest:
    """Ask which job the fields would create, without creating it."""
    return ApiRequest(method="POST", path="/v1/estimate", json=_said(fields))


def replay_job(job_id: str, key: str) -> ApiRequest:
    """Ask for a new job with every parameter of that one."""
    return ApiRequest(method="POST", path=f"/v1/jobs/{job_id}/replay", headers=_once(key))


def delete_job(job_id: str) -> ApiRequest:
    """Erase the job's prompt and images; the audit log stays."""
    return ApiRequest(method="DELETE", path=f"/v1/jobs/{job_id}")


def show_job(job_id: str, wait_s: int | None = None) -> ApiRequest:
    """Ask for the job.

    wait_s: let the gateway hold the answer until the job is finished, at most so long (it allows
    60).
    """
    headers = {"Prefer": f"wait={wait_s}"} if wait_s else {}
    return ApiRequest(method="GET", path=f"/v1/jobs/{job_id}", headers=headers, held_s=wait_s or 0)


def show_status(job_id: str) -> ApiRequest:
    """Ask for the job's state and place in the queue, which is cheap for the gateway."""
    return ApiRequest(method="GET", path=f"/v1/jobs/{job_id}/status")


def list_jobs(
    *,
    state: str | None,
    since: datetime | None,
    until: datetime | None,
    metadata: Mapping[str, str] | None,
    limit: int,
    cursor: str | None,
) -> ApiRequest:
    said = {
        "state": state,
        "created_after": _instant(since) if since else None,
        "created_before": _instant(until) if until else None,
        "limit": limit,
        "cursor": cursor,
    }
    labels = {f"metadata.{name}": value for name, value in (metadata or {}).items()}
    return ApiRequest(method="GET", path="/v1/jobs", params=_said(said) | labels)


def cancel_job(job_id: str) -> ApiRequest:
    return ApiRequest(method="POST", path=f"/v1/jobs/{job_id}/cancel")


def show_image(job_id: str, index: int, *, direct: bool = False) -> ApiRequest:
    """Ask for an image.

    The answer is a redirect to a presigned URL of the object store, or the image itself. direct:
    ask for the image itself.
    """
    return ApiRequest(
        method="GET",
        path=f"/v1/jobs/{job_id}/images/{index}",
        params={"redirect": "false"} if direct else {},
    )


def follow_job(job_id: str, *, previews: bool, after: str | None) -> ApiRequest:
    """Ask for server-sent events. after: the id of the last event that was seen."""
    headers = {
        "Accept": "text/event-stream",
        "Cache-Control": "no-store",
        **({"Last-Event-ID": after} if after else {}),
    }
    params = {"previews": "true"} if previews else {}
    return ApiRequest(
        method="GET",
        path=f"/v1/jobs/{job_id}/events",
        params=params,
        headers=headers,
        held_s=_HEARTBEATS_S,
    )


def upload(name: str, content: bytes) -> ApiRequest:
    """Send a picture to start images from."""
    return ApiRequest(method="POST", path="/v1/files", file=(name, content), held_s=_LARGE_S)


def show_usage() -> ApiRequest:
    """Ask what the tenant used, and for its limits."""
    return ApiRequest(method="GET", path="/v1/usage")


def list_of(resource: str) -> ApiRequest:
    """Ask for the whole list of a resource: models or tiers."""
    return ApiRequest(method="GET", path=f"/v1/{resource}")


def _said(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _instant(at: datetime) -> str:
    """Write an instant with its offset; one without an offset is taken as local time."""
    return at.astimezone(UTC).isoformat()


def _once(key: str) -> dict[str, str]:
    return {"Idempotency-Key": key}
