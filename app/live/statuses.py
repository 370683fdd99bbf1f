"""Cache the status of jobs for clients that poll.

Each job is read at most once a second, however many clients ask.
"""

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass

from app.live.cache import Cache

FRESH_FOR_S = 1.0
MAX_KEPT = 10_000  # at some 700 bytes each
MOST_ROOTS = 8  # a proxy may give the gateway several


@dataclass(frozen=True)
class Status:
    """The body of an answer, and its digest."""

    content: bytes
    etag: str


class Statuses:
    """The statuses of one gateway process. Callers that ask during a read wait for its answer."""

    def __init__(self) -> None:
        self._kept: Cache[tuple[uuid.UUID, uuid.UUID, str], Status] = Cache(
            "statuses", MAX_KEPT, keep_for_s=FRESH_FOR_S
        )
        self._roots: set[str] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def get(
        self, tenant_id: uuid.UUID, job_id: uuid.UUID, read: Callable[[], bytes], *, root: str = ""
    ) -> Status:
        """Return the status as it was at most a second ago; `read` returns a new one.

        root: the path prefix of its links. Statuses under more than `MOST_ROOTS` prefixes are not
        cached.
        """

        def read_status() -> Status:
            content = read()
            return Status(content, hashlib.sha256(content).hexdigest()[:32])

        if root not in self._roots:
            if len(self._roots) >= MOST_ROOTS:
                return read_status()
            # A new set, because another thread may be iterating over the old one in `forget`.
            self._roots = self._roots | {root}
        return self._kept.get((tenant_id, job_id, root), read_status)

    def forget(self, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
        """Drop the job's status, so that the next `get` sees a change that was just made."""
        for root in self._roots:
            self._kept.forget((tenant_id, job_id, root))
