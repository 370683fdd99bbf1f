"""Decoded pixels on their way from a GPU to storage: the claim-check in a Redis of its own.

The key names job, image and attempt, so a late worker never overwrites a newer attempt's pixels. Values carry their
shape and digest. Read with GET and delete after the commit: a results task killed in between finds them again.
"""

import hashlib
import json
import math
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import redis
from numpy.typing import NDArray

from edges.connections import connect
from edges.errors import wrap
from policy import gates

PROBE = "darkroom:probe"  # written to see whether anything can be


class HandoffUnavailable(Exception):
    """The hand-off cannot be reached, or is full."""


class HandoffCorrupt(Exception):
    """What came back is not what was put: treat it as gone."""


@dataclass(frozen=True)
class Pixels:
    """Decoded RGB, uint8 [h, w, 3], and the digest that names the image wherever it goes."""

    array: NDArray[np.uint8]
    sha256: str


class Handoff:
    """`put` by the worker, `get` and `drop` by the results task."""

    def __init__(self, handoff_url: str, *, ttl_s: int) -> None:
        self._redis = connect(handoff_url, socket_timeout=10)
        self._ttl_s = ttl_s

    def put(self, job_id: uuid.UUID, index: int, attempt: int, pixels: NDArray[np.uint8]) -> str:
        """Keep the pixels for `ttl_s`; their sha256 comes back. Raises HandoffUnavailable."""
        digest = pixels_sha256(pixels)
        head = json.dumps({"shape": pixels.shape, "sha256": digest}).encode()
        body = np.ascontiguousarray(pixels).tobytes()
        with wrap(redis.RedisError, HandoffUnavailable):
            self._redis.set(
                _key(job_id, index, attempt),
                len(head).to_bytes(4, "big") + head + body,
                ex=self._ttl_s,
            )
        return digest

    def get(self, job_id: uuid.UUID, index: int, attempt: int) -> Pixels | None:
        """The pixels, or None if they are gone. Raises HandoffUnavailable, HandoffCorrupt."""
        with wrap(redis.RedisError, HandoffUnavailable):
            blob = self._redis.get(_key(job_id, index, attempt))
        if blob is None:
            return None
        try:
            end = 4 + int.from_bytes(blob[:4], "big")
            head = json.loads(blob[4:end])
            array = np.frombuffer(blob, dtype=np.uint8, offset=end).reshape(head["shape"])
            digest, expected = pixels_sha256(array), head["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise HandoffCorrupt(str(error)) from error
        if digest != expected:
            raise HandoffCorrupt("the digest does not fit the pixels")
        return Pixels(array, digest)

    def holds(self, job_id: uuid.UUID, index: int, attempt: int) -> bool:
        """Raises HandoffUnavailable."""
        with wrap(redis.RedisError, HandoffUnavailable):
            return bool(self._redis.exists(_key(job_id, index, attempt)))

    def drop(self, job_id: uuid.UUID, index: int, attempt: int) -> None:
        """Forget the pixels, if they are there and the hand-off is; otherwise their TTL does."""
        try:
            self._redis.delete(_key(job_id, index, attempt))
        except redis.RedisError:
            return

    def kept(self) -> Iterator[tuple[str, uuid.UUID, int, int]]:
        """Everything that is kept for a job: (key, job, image index, attempt). Raises HandoffUnavailable."""
        with wrap((redis.RedisError, ValueError), HandoffUnavailable):
            for raw in self._redis.scan_iter(match="handoff:*", count=500):
                _, job_id, index, attempt = raw.decode().split(":")
                yield raw.decode(), uuid.UUID(job_id), int(index), int(attempt)

    def forget(self, keys: list[str]) -> None:
        """Drop these keys of `kept()`. Raises HandoffUnavailable."""
        with wrap(redis.RedisError, HandoffUnavailable):
            if keys:
                self._redis.unlink(*keys)

    def check(self) -> None:
        """Raises HandoffUnavailable unless it takes what is written: one that is read-only answers a ping."""
        with wrap(redis.RedisError, HandoffUnavailable):
            self._redis.set(PROBE, 1, ex=60)


class Gauge:
    """How full the hand-off is: pixels that are not stored fast enough fill it, and whoever makes or accepts more should wait.

    Asked as often as one likes; Redis is asked at most once a second. While it does not answer, or refuses what is written,
    the last answer holds, for `trusted_for_s`; after that it counts as full.
    """

    def __init__(self, handoff_url: str, *, trusted_for_s: float = math.inf) -> None:
        self._redis = connect(handoff_url, socket_timeout=1, socket_connect_timeout=1)
        self._trusted_for_s = trusted_for_s
        self._fill, self._asked_at, self._answered_at = 0.0, -math.inf, time.monotonic()

    def fill(self) -> float:
        """Memory in use / `maxmemory`; 0 where there is no limit."""
        now = time.monotonic()
        if now - self._asked_at > 1.0:
            self._asked_at = now
            try:
                memory = self._redis.info("memory")
                self._fill = (
                    memory["used_memory"] / memory["maxmemory"] if memory.get("maxmemory") else 0.0
                )
                self._redis.set(PROBE, 1, ex=60)
                self._answered_at = now
            except redis.RedisError:
                pass
        silent_s = now - self._answered_at
        return gates.believed_fill(
            self._fill,
            silent_s=silent_s,
            trusted_for_s=self._trusted_for_s,
        )


def pixels_sha256(pixels: NDArray[np.uint8]) -> str:
    """Digest of width, height and the RGB bytes, row by row: what "the same image" means everywhere in the house."""
    height, width, _ = pixels.shape
    digest = hashlib.sha256(f"{width}x{height} RGB8\n".encode())
    digest.update(np.ascontiguousarray(pixels))
    return digest.hexdigest()


def _key(job_id: uuid.UUID, index: int, attempt: int) -> str:
    return f"handoff:{job_id}:{index}:{attempt}"
