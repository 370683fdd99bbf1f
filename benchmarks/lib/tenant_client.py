"""The API as one tenant calls it.

It asks for images, cancels, and waits as long as it is told when it is refused.
"""

import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx

THREADS = 8
LONGEST_WAIT_S = 10  # between two tries, whatever Retry-After says: a benchmark has an end
PATIENCE_S = 60  # for one job, where no event says when to stop
TRY_LATER = (httpx.codes.TOO_MANY_REQUESTS, httpx.codes.SERVICE_UNAVAILABLE)


class TenantClient:
    """One tenant's connections. Safe to share among threads.

    Raw HTTP and not `darkroom_client`: that one does not tell what Retry-After said.
    """

    def __init__(self, url: str, api_key: str) -> None:
        limits = httpx.Limits(
            max_connections=2 * THREADS,
            max_keepalive_connections=2 * THREADS,
            keepalive_expiry=10,
        )
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {api_key}"},
            limits=limits,
            timeout=30,
            trust_env=False,
        )
        # How long the POST of each accepted job took; tries that were refused are left out.
        self.accept_s: list[float] = []
        self.refusals = 0
        self.was_refused = threading.Event()

    def __enter__(self) -> "TenantClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(
        self, parameters: Mapping[str, Any], stop: threading.Event | None = None
    ) -> str | None:
        """Submit a job; return the accepted job's id, or None if `stop` is set meanwhile.

        When refused for now, try again after Retry-After. SystemExit for any other refusal,
        and without `stop` after PATIENCE_S.
        """
        give_up_at = time.monotonic() + PATIENCE_S
        stopped = stop or threading.Event()
        while not stopped.is_set():
            started_at = time.perf_counter()
            answer = self._http.post("/v1/jobs", json=dict(parameters))
            if answer.status_code == httpx.codes.ACCEPTED:
                self.accept_s.append(time.perf_counter() - started_at)
                return str(answer.json()["id"])
            is_over = stop is None and time.monotonic() > give_up_at
            if answer.status_code not in TRY_LATER or is_over:
                raise SystemExit(f"a job was refused: {answer.status_code} {answer.text[:500]}")
            self.refusals += 1
            self.was_refused.set()
            stopped.wait(min(LONGEST_WAIT_S, float(answer.headers.get("Retry-After", 1))))
        return None

    def submit_batch(self, wanted: Sequence[Mapping[str, Any]]) -> list[str]:
        """Submit jobs in one request; return their ids. SystemExit unless all were accepted."""
        answer = self._http.post("/v1/jobs:batch", json={"jobs": list(wanted)})
        if answer.status_code != httpx.codes.OK or answer.json()["refused"]:
            raise SystemExit(f"a batch was refused: {answer.status_code} {answer.text[:500]}")
        return [str(item["job"]["id"]) for item in answer.json()["data"]]

    def cancel(self, job_ids: Iterable[str]) -> None:
        """Cancel these jobs, several at a time; those that ended otherwise stay as they are."""
        with ThreadPoolExecutor(THREADS) as threads:
            for answer in threads.map(self._cancel, job_ids):
                if answer.status_code not in (httpx.codes.OK, httpx.codes.CONFLICT):
                    raise SystemExit(
                        f"a cancel was refused: {answer.status_code} {answer.text[:500]}"
                    )

    def _cancel(self, job_id: str) -> httpx.Response:
        return self._http.post(f"/v1/jobs/{job_id}/cancel")
