"""Who may do what in the two Redis: a user for each kind of process, as lines of redis-server's configuration.

Nobody but the operator (the default user) may flush, configure or stop a server. In the hand-off each kind of process sees the keys
that it has to do with; docker-compose.yml says the same in its own way, and a test holds the two together. Written for Redis 6.2,
which the one-machine stack runs, so without what 7 could say more finely: which keys may only be read.
"""

from collections.abc import Mapping

_ANYTHING_ORDINARY = "+@all -@admin -@dangerous +info"

BROKER = {
    **dict.fromkeys(
        ("gateway", "worker", "results", "sweeper", "webhooks"), f"~* &* {_ANYTHING_ORDINARY}"
    ),
    # Flower looks: it can read queues and ask workers (what it writes is where their answers go), and put no task anywhere.
    "flower": "~* &* +@read +@connection +@pubsub +@transaction +@scripting -@dangerous +info +time +brpop +sadd +srem +zadd +zrem +del",
}
HANDOFF = {
    "gateway": (
        "~handoff:* ~snapshot:* ~input:* ~progress:* ~events:* ~watch:* ~budget:* ~LIMITS* ~darkroom:probe"
        f" &darkroom:* {_ANYTHING_ORDINARY}"
    ),
    "worker": f"~handoff:* ~snapshot:* ~input:* ~progress:* ~events:* ~watch:* ~darkroom:probe &darkroom:* {_ANYTHING_ORDINARY}",
    "results": f"~handoff:* ~snapshot:* ~input:* ~progress:* ~events:* ~darkroom:probe &darkroom:* {_ANYTHING_ORDINARY}",
    "sweeper": f"~handoff:* ~snapshot:* ~input:* ~progress:* ~events:* ~darkroom:probe &darkroom:* {_ANYTHING_ORDINARY}",
    "webhooks": "&darkroom:endings +@connection +@pubsub",  # hears which jobs have ended
}


def lines(users: Mapping[str, str], passwords: Mapping[str, str]) -> list[str]:
    """`user NAME …`, one for each user; passwords by name."""
    return [
        f"user {name} on >{passwords[name]} resetchannels {rules}" for name, rules in users.items()
    ]
