"""Define a Redis user for each kind of process, as lines of redis-server's configuration.

Nobody but the operator (the default user) may flush, configure or stop a server. In the hand-off
each kind of process can use only the keys that it needs. docker-compose.yml has the same rules in
its own syntax, and a test compares the two. Written for Redis 6.2, which the one-machine stack
runs; so keys that a process may only read, which Redis 7 knows, are not marked.
"""

from collections.abc import Mapping

_ANYTHING_ORDINARY = "+@all -@admin -@dangerous +info"

_ON_ALL_KEYS = f"~* &* {_ANYTHING_ORDINARY}"

BROKER = {
    **dict.fromkeys(("gateway", "worker", "results", "sweeper", "webhooks"), _ON_ALL_KEYS),
    # Flower can read queues and ask workers (it writes where their answers go), but queue no task.
    "flower": (
        "~* &* +@read +@connection +@pubsub +@transaction +@scripting -@dangerous"
        " +info +time +brpop +sadd +srem +zadd +zrem +del"
    ),
}
_KEYS_OF_JOBS = "~handoff:* ~snapshot:* ~input:* ~progress:* ~events:*"
_SIGNALS = f"&darkroom:* {_ANYTHING_ORDINARY}"
HANDOFF = {
    "gateway": f"{_KEYS_OF_JOBS} ~watch:* ~budget:* ~LIMITS* ~darkroom:probe {_SIGNALS}",
    "worker": f"{_KEYS_OF_JOBS} ~watch:* ~darkroom:probe {_SIGNALS}",
    "results": f"{_KEYS_OF_JOBS} ~darkroom:probe {_SIGNALS}",
    "sweeper": f"{_KEYS_OF_JOBS} ~darkroom:probe {_SIGNALS}",
    "webhooks": "&darkroom:endings +@connection +@pubsub",  # listens for ended jobs
}


def lines(users: Mapping[str, str], passwords: Mapping[str, str]) -> list[str]:
    """Return a line `user NAME …` for each user; passwords: by name."""
    return [
        f"user {name} on >{passwords[name]} resetchannels {rules}" for name, rules in users.items()
    ]
