"""Keep decoded pixels on their way from a GPU to storage, in a Redis of its own.

The key names job, image and attempt, so a late worker never overwrites a newer attempt's pixels.
Values carry their shape and digest. Read with GET and delete after the commit: a results task that
is killed in between finds them again.
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

from edges import connections
from edges.errors import wrap
from policy import gates

PROBE = "darkroom:probe"  # the key that `check` and Gauge write


class HandoffUnavailable(Exception):
    """The hand-off cannot be reached, or is full."""


class HandoffCorrupt(Exception):
    """The value read is not the value written; treat the pixels as gone."""


@dataclass(frozen=True)
class Pixels:
    """Hold decoded RGB, uint8 [h, w, 3], and the digest that identifies the image everywhere."""

    array: NDArray[np.uint8]
    sha256: str


class Handoff:
    """Keep pixels between two processes: the worker puts, the results task gets and drops."""

    def __init__(self, handoff_url: str, *, ttl_s: int) -> None:
        self._redis = connections.connect(handoff_url, socket_timeout=10)
        self._ttl_s = ttl_s

    def put(self, job_id: uuid.UUID, index: int, attempt: int, pixels: NDArray[np.uint8]) -> str:
        """Keep the pixels for `ttl_s` and return their sha256. Raises HandoffUnavailable."""
        digest = pixels_sha256(pixels)
        head = json.dumps({"shape": pixels.shape, "sha256": digest}).encode()
        body = np.ascontiguousarray(pixels).tobytes()
        with wrap(redis.RedisError, HandoffUnavailable):
            value = len(head).to_bytes(4, "big") + head + body
            self._redis.set(_key(job_id, index, attempt), value, ex=self._ttl_s)
        return digest

    def get(self, job_id: uuid.UUID, index: int, attempt: int) -> Pixels | None:
        """Return the pixels; None if they are gone. Raises HandoffUnavailable, HandoffCorrupt."""
        with wrap(redis.RedisError, HandoffUnavailable):
            blob = connections.get(self._redis, _key(job_id, index, attempt))
        if blob is None:
            return None
        try:
            end = 4 + int.from_bytes(blob[:4], "big")
            head = json.loads(blob[4:end])
            array = np.frombuffer(blob, dtype=np.uint8, offset=end).reshape(head["shape"])
            digest = pixels_sha256(array)
            expected = head["sha256"]
        except (ValueError, KeyError, TypeError) as error:
            raise HandoffCorrupt(str(error)) from error
        if digest != expected:
            raise HandoffCorrupt("the digest does not fit the pixels")
        return Pixels(array, digest)

    def holds(self, job_id: uuid.UUID, index: int, attempt: int) -> bool:
        """Tell whether the pixels are there. Raises HandoffUnavailable."""
        with wrap(redis.RedisError, HandoffUnavailable):
            return bool(self._redis.exists(_key(job_id, index, attempt)))

    def drop(self, job_id: uuid.UUID, index: int, attempt: int) -> None:
        """Delete the pixels. If the hand-off is away, their TTL does it."""
        try:
            self._redis.delete(_key(job_id, index, attempt))
        except redis.RedisError:
            return

    def kept(self) -> Iterator[tuple[str, uuid.UUID, int, int]]:
        """Yield (key, job, image index, attempt) of all pixels kept. Raises HandoffUnavailable."""
        with wrap((redis.RedisError, ValueError), HandoffUnavailable):
            for raw in self._redis.scan_iter(match="handoff:*", count=500):
                _, job_id, index, attempt = raw.decode().split(":")
                yield raw.decode(), uuid.UUID(job_id), int(index), int(attempt)

    def forget(self, keys: list[str]) -> None:
        """Delete these keys of `kept()`. Raises HandoffUnavailable."""
        with wrap(redis.RedisError, HandoffUnavailable):
            if keys:
                self._redis.unlink(*keys)

    def check(self) -> None:
        """Raise HandoffUnavailable unless the hand-off accepts a write.

        A ping would not do: a read-only Redis answers it.
        """
        with wrap(redis.RedisError, HandoffUnavailable):
            self._redis.set(PROBE, 1, ex=60)


class Gauge:
    """Tell how full the hand-off is, for those who make or accept work that fills it further.

    Redis is asked at most once a second, however often a caller asks. While it does not answer, or
    refuses a write, the last answer holds for `trusted_for_s`; after that it counts as full.
    """

    def __init__(self, handoff_url: str, *, trusted_for_s: float = math.inf) -> None:
        self._redis = connections.connect(handoff_url, socket_timeout=1, socket_connect_timeout=1)
        self._trusted_for_s = trusted_for_s
        self._fill = 0.0
        self._asked_at = -math.inf
        self._answered_at = time.monotonic()

    def fill(self) -> float:
        """Return memory in use / `maxmemory`, 0 without a limit; 1 if Redis was silent too long."""
        now = time.monotonic()
        if now - self._asked_at > 1.0:
            self._asked_at = now
            try:
                memory = self._redis.info("memory")
                limit = memory.get("maxmemory")
                self._fill = memory["used_memory"] / limit if limit else 0.0
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
    """Return the digest of width, height and the RGB bytes, row by row.

    Two images count as the same, everywhere, if and only if their digests are equal.
    """
    height, width, _ = pixels.shape
    digest = hashlib.sha256(f"{width}x{height} RGB8\n".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


def _key(job_id: uuid.UUID, index: int, attempt: int) -> str:
    return f"handoff:{job_id}:{index}:{attempt}"
