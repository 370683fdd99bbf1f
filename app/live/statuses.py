"""How a job stands, for those who ask often.

Read from the database at most once a second per job, however many ask.
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
    """One per gateway process. Who asks while another one reads waits for that answer."""

    def __init__(self) -> None:
        self._kept: Cache[tuple[uuid.UUID, uuid.UUID, str], Status] = Cache(
            "statuses", MAX_KEPT, keep_for_s=FRESH_FOR_S
        )
        self._roots: set[str] = set()

    def __len__(self) -> int:
        return len(self._kept)

    def get(
        self,
        tenant_id: uuid.UUID,
        job_id: uuid.UUID,
        read: Callable[[], bytes],
        *,
        root: str = "",
    ) -> Status:
        """Give the status as it was at most a second ago; `read` gives it anew.

        root: the path under which its links are; beyond `MOST_ROOTS` nothing is remembered.
        """

        def read_status() -> Status:
            content = read()
            return Status(content, hashlib.sha256(content).hexdigest()[:32])

        if root not in self._roots:
            if len(self._roots) >= MOST_ROOTS:
                return read_status()
            # a new set: `forget` may be going through the old one
            self._roots = self._roots | {root}
        return self._kept.get((tenant_id, job_id, root), read_status)

    def forget(self, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
        """Make whoever asks from now on see the change that has just been made to the job."""
        for root in self._roots:
            self._kept.forget((tenant_id, job_id, root))
