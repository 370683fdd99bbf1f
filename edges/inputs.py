"""Pictures on their way to a GPU that renders from them: brought by whoever may read the object store, in the hand-off's Redis.

A hash per job with a field per role, the picture as the engine takes it, or the word that it is gone for good. The same for every
attempt, so no attempt is in the key. Dropped when a worker lets the job go; it is brought again to the next one.
"""

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import redis
from numpy.typing import NDArray

from edges.connections import connect
from edges.errors import wrap
from edges.handoff import HandoffUnavailable


@dataclass(frozen=True)
class Gone:
    """The picture of a role is not in the store any more; `reason` may be told to whoever asked for the job."""

    reason: str


Brought = NDArray[np.uint8] | Gone


class Inputs:
    """`bring` by the results task, `of` by the worker, `jobs` by the sweeper.

    `drop` by the worker that has rendered, by whoever ends the job, and by the sweeper.
    """

    def __init__(self, handoff_url: str, *, ttl_s: int) -> None:
        self._redis = connect(handoff_url, socket_timeout=10)
        self._ttl_s = ttl_s

    def bring(self, job_id: uuid.UUID, brought: Mapping[str, Brought]) -> None:
        """Keep all pictures of the job, by role, for `ttl_s`; all at once, so nobody sees a part of them. Raises HandoffUnavailable."""
        fields = {role: _packed(picture) for role, picture in brought.items()}
        with wrap(redis.RedisError, HandoffUnavailable):
            pipe = self._redis.pipeline()
            pipe.hset(_key(job_id), mapping=fields)
            pipe.expire(_key(job_id), self._ttl_s)
            pipe.execute()

    def are_there(self, job_id: uuid.UUID) -> bool:
        """Raises HandoffUnavailable."""
        with wrap(redis.RedisError, HandoffUnavailable):
            return bool(self._redis.exists(_key(job_id)))

    def of(self, job_id: uuid.UUID) -> dict[str, Brought]:
        """What was brought for the job, by role; empty if nothing was (yet). Raises HandoffUnavailable."""
        with wrap((redis.RedisError, ValueError, KeyError, TypeError), HandoffUnavailable):
            return {
                role.decode(): _unpacked(packed)
                for role, packed in self._redis.hgetall(_key(job_id)).items()
            }

    def drop(self, job_ids: Iterable[uuid.UUID]) -> None:
        """Forget what was brought for these jobs. Raises HandoffUnavailable; then the TTL does it."""
        with wrap(redis.RedisError, HandoffUnavailable):
            if keys := [_key(job_id) for job_id in job_ids]:
                self._redis.unlink(*keys)

    def jobs(self) -> list[uuid.UUID]:
        """Every job that something is kept for. Raises HandoffUnavailable."""
        with wrap((redis.RedisError, ValueError), HandoffUnavailable):
            return [
                uuid.UUID(key.decode().partition(":")[2])
                for key in self._redis.scan_iter(match=_key("*"), count=500)
            ]


def _packed(picture: Brought) -> bytes:
    if isinstance(picture, Gone):
        head, body = json.dumps({"gone": picture.reason}), b""
    else:
        head, body = json.dumps({"shape": picture.shape}), np.ascontiguousarray(picture).tobytes()
    return len(head).to_bytes(4, "big") + head.encode() + body


def _unpacked(packed: bytes) -> Brought:
    end = 4 + int.from_bytes(packed[:4], "big")
    head = json.loads(packed[4:end])
    if "gone" in head:
        return Gone(str(head["gone"]))
    return np.frombuffer(packed, dtype=np.uint8, offset=end).reshape(head["shape"])


def _key(job_id: object) -> str:
    return f"input:{job_id}"
