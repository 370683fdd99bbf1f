"""Keep snapshots of unfinished images, so that another worker can resume where one stopped.

One hash per job in the hand-off's Redis. Best effort: a lost snapshot costs the steps before it,
never the image. A field holds the newest snapshot of one image, with its attempt and step: a late
write never overwrites a newer snapshot.
"""

import uuid
from collections.abc import Iterable
from dataclasses import dataclass

import redis

from edges.connections import connect, hgetall
from edges.errors import wrap

STORE = "handoff"  # the value of `attempts.snapshot_store`

_PUT = """
local old = redis.call('HGET', KEYS[1], ARGV[1])
if old then
    local attempt, step = string.match(old, '^(%d+) (%d+) ')
    attempt, step = tonumber(attempt), tonumber(step)
    local is_same = attempt == tonumber(ARGV[2])
    if attempt > tonumber(ARGV[2]) or (is_same and step > tonumber(ARGV[3])) then return 0 end
end
redis.call('HSET', KEYS[1], ARGV[1], ARGV[2] .. ' ' .. ARGV[3] .. ' ' .. ARGV[4])
redis.call('EXPIRE', KEYS[1], ARGV[5])
return 1
"""


class SnapshotsUnavailable(Exception):
    """Snapshots cannot be read or kept right now; go on without."""


@dataclass(frozen=True)
class StoredSnapshot:
    """Hold the newest snapshot of one image, the attempt that made it, and its step."""

    attempt: int
    step: int
    blob: bytes


class Snapshots:
    """Keep, read and drop snapshots.

    A worker puts them now and then and when it has to leave; the next worker reads them; whoever
    ends the job, or the sweeper, drops them.
    """

    def __init__(self, handoff_url: str, *, ttl_s: int) -> None:
        self._redis = connect(handoff_url, socket_timeout=5)
        self._put = self._redis.register_script(_PUT)
        self._ttl_s = ttl_s

    def put(self, job_id: uuid.UUID, index: int, attempt: int, step: int, blob: bytes) -> bool:
        """Keep the snapshot for `ttl_s`; False if there is one of a later attempt or step.

        Raises SnapshotsUnavailable.
        """
        with wrap(redis.RedisError, SnapshotsUnavailable):
            return bool(
                self._put(keys=[_key(job_id)], args=[index, attempt, step, blob, self._ttl_s])
            )

    def of(self, job_id: uuid.UUID) -> dict[int, StoredSnapshot]:
        """Return the snapshots of the job's images, by index. Raises SnapshotsUnavailable."""
        with wrap(redis.RedisError, SnapshotsUnavailable):
            fields = hgetall(self._redis, _key(job_id))
        kept = {}
        for index, value in fields.items():
            attempt, step, blob = value.split(b" ", 2)
            kept[int(index)] = StoredSnapshot(int(attempt), int(step), blob)
        return kept

    def jobs(self) -> list[uuid.UUID]:
        """List every job that has snapshots here. Raises SnapshotsUnavailable."""
        with wrap((redis.RedisError, ValueError), SnapshotsUnavailable):
            return [
                uuid.UUID(key.decode().partition(":")[2])
                for key in self._redis.scan_iter(match=_key("*"), count=500)
            ]

    def drop(self, job_ids: Iterable[uuid.UUID]) -> None:
        """Delete the snapshots of these jobs. Raises SnapshotsUnavailable."""
        with wrap(redis.RedisError, SnapshotsUnavailable):
            if keys := [_key(job_id) for job_id in job_ids]:
                self._redis.unlink(*keys)


def place(job_id: uuid.UUID, index: int) -> str:
    """Return the value of `images.snapshot_ref` that names a snapshot."""
    return f"{STORE}:{_key(job_id)}#{index}"


def _key(job_id: object) -> str:
    return f"snapshot:{job_id}"
