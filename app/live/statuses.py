"""How a job stands, for those who ask often: read from the database at most once a second per job, however many ask."""

import hashlib
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Lock

FRESH_FOR_S = 1.0
MAX_KEPT = 10_000  # at some 700 bytes each
_STRIPES = 64


@dataclass(frozen=True)
class Status:
    """The body of an answer, and its digest."""

    content: bytes
    etag: str


@dataclass
class Statuses:
    """One per gateway process. Who asks while another one reads waits for that answer."""

    _kept: OrderedDict[tuple[uuid.UUID, uuid.UUID], tuple[float, str, Status | None]] = field(default_factory=OrderedDict, init=False)
    _lock: Lock = field(default_factory=Lock, init=False)
    _stripes: list[Lock] = field(default_factory=lambda: [Lock() for _ in range(_STRIPES)], init=False)

    def get(self, tenant_id: uuid.UUID, job_id: uuid.UUID, read: Callable[[], bytes], *, root: str = "") -> Status:
        """The status as it was at most a second ago; `read` gives it anew. root: the path under which its links are."""
        key = (tenant_id, job_id)
        with self._stripe(job_id):
            with self._lock:
                read_at, known_root, known = self._kept.get(key, (-FRESH_FOR_S, root, None))
            began = time.monotonic()
            if known is not None and known_root == root and began - read_at < FRESH_FOR_S:
                return known
            content = read()
            status = Status(content, hashlib.sha256(content).hexdigest()[:32])
            with self._lock:
                self._kept[key] = began, root, status
                self._kept.move_to_end(key)
                while len(self._kept) > MAX_KEPT:
                    self._kept.popitem(last=False)
            return status

    def forget(self, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
        """The job has just changed: whoever asks from now on is to see it."""
        with self._stripe(job_id), self._lock:
            self._kept.pop((tenant_id, job_id), None)

    def _stripe(self, job_id: uuid.UUID) -> Lock:
        return self._stripes[hash(job_id) % _STRIPES]
