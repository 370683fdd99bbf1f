"""Keep the input pictures of a job on their way to a GPU, in the hand-off's Redis.

The results task, which may read the object store, writes them. There is one hash per job with one
field per role: the picture as the engine takes it, or a note that it is gone for good. They are the
same for every attempt, so no attempt is in the key. They are dropped when a worker releases the
job, and brought again for the next worker.
"""

import json
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import redis
from numpy.typing import NDArray
from redis.typing import EncodableT, FieldT

from edges.connections import connect, hgetall
from edges.errors import wrap
from edges.handoff import HandoffUnavailable


@dataclass(frozen=True)
class PictureGone:
    """Say that a role's picture is no longer in the store; `reason` may be shown to the tenant."""

    reason: str


StagedPicture = NDArray[np.uint8] | PictureGone


class Inputs:
    """Keep the input pictures of jobs between the object store and a worker.

    `bring` is called by the results task, `of` by the worker, `jobs` by the sweeper; `drop` by the
    worker that has rendered, by whoever ends the job, and by the sweeper.
    """

    def __init__(self, handoff_url: str, *, ttl_s: int) -> None:
        self._redis = connect(handoff_url, socket_timeout=10)
        self._ttl_s = ttl_s

    def bring(self, job_id: uuid.UUID, brought: Mapping[str, StagedPicture]) -> None:
        """Keep all pictures of the job, by role, for `ttl_s`. Raises HandoffUnavailable.

        In one transaction, so that no reader sees only some of them.
        """
        fields: dict[FieldT, EncodableT] = {
            role: _packed(picture) for role, picture in brought.items()
        }
        with wrap(redis.RedisError, HandoffUnavailable):
            pipe = self._redis.pipeline()
            pipe.hset(_key(job_id), mapping=fields)
            pipe.expire(_key(job_id), self._ttl_s)
            pipe.execute()

    def are_there(self, job_id: uuid.UUID) -> bool:
        """Tell whether the job's pictures are there. Raises HandoffUnavailable."""
        with wrap(redis.RedisError, HandoffUnavailable):
            return bool(self._redis.exists(_key(job_id)))

    def of(self, job_id: uuid.UUID) -> dict[str, StagedPicture]:
        """Return the job's pictures by role; {} if there are none. Raises HandoffUnavailable."""
        with wrap((redis.RedisError, ValueError, KeyError, TypeError), HandoffUnavailable):
            return {
                role.decode(): _unpacked(packed)
                for role, packed in hgetall(self._redis, _key(job_id)).items()
            }

    def drop(self, job_ids: Iterable[uuid.UUID]) -> None:
        """Delete the pictures of these jobs. Raises HandoffUnavailable; then the TTL does it."""
        with wrap(redis.RedisError, HandoffUnavailable):
            if keys := [_key(job_id) for job_id in job_ids]:
                self._redis.unlink(*keys)

    def jobs(self) -> list[uuid.UUID]:
        """List every job that has pictures here. Raises HandoffUnavailable."""
        with wrap((redis.RedisError, ValueError), HandoffUnavailable):
            return [
                uuid.UUID(key.decode().partition(":")[2])
                for key in self._redis.scan_iter(match=_key("*"), count=500)
            ]


def _packed(picture: StagedPicture) -> bytes:
    if isinstance(picture, PictureGone):
        head = json.dumps({"gone": picture.reason})
        body = b""
    else:
        head = json.dumps({"shape": picture.shape})
        body = np.ascontiguousarray(picture).tobytes()
    return len(head).to_bytes(4, "big") + head.encode() + body


def _unpacked(packed: bytes) -> StagedPicture:
    end = 4 + int.from_bytes(packed[:4], "big")
    head = json.loads(packed[4:end])
    if "gone" in head:
        return PictureGone(str(head["gone"]))
    return np.frombuffer(packed, dtype=np.uint8, offset=end).reshape(head["shape"])


def _key(job_id: object) -> str:
    return f"input:{job_id}"
