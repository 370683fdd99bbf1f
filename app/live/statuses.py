"""How a job stands, for those who ask often.

Read from the database at most once a second per job, however many ask.
"""

import hashlib
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field

from app.live.cache import Cache

FRESH_FOR_S = 1.0
MAX_KEPT = 10_000  # at some 700 bytes each


@dataclass(frozen=True)
class Status:
    """The body of an answer, and its digest.

    root: the path under which its links are.
    """

    content: bytes
    etag: str
    root: str


def _kept() -> Cache[tuple[uuid.UUID, uuid.UUID], Status]:
    return Cache(MAX_KEPT, keep_for_s=FRESH_FOR_S)


@dataclass
class Statuses:
    """One per gateway process. Who asks while another one reads waits for that answer."""

    _kept: Cache[tuple[uuid.UUID, uuid.UUID], Status] = field(default_factory=_kept, init=False)

    def get(
        self,
        tenant_id: uuid.UUID,
        job_id: uuid.UUID,
        read: Callable[[], bytes],
        *,
        root: str = "",
    ) -> Status:
        """Give the status as it was at most a second ago; `read` gives it anew.

        root: the path under which its links are. Where clients ask under several, the others
        read for themselves as long as that of one of them is kept: it is forgotten as one.
        """

        def read_status() -> Status:
            content = read()
            return Status(content, hashlib.sha256(content).hexdigest()[:32], root)

        status = self._kept.get((tenant_id, job_id), read_status)
        return status if status.root == root else read_status()

    def forget(self, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
        """Make whoever asks from now on see the change that has just been made to the job."""
        self._kept.forget((tenant_id, job_id))
