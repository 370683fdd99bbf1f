"""When to try again, and after how long. Decides only; whoever asks does the waiting.

Every request of this client may be repeated: reads and cancels are harmless, uploads are content-addressed, and whatever makes
jobs carries an Idempotency-Key, the same over all its tries.
"""

import email.utils
import random
from dataclasses import dataclass
from datetime import UTC, datetime

import httpx

_PASSING = frozenset({429, 502, 503, 504})
# Our own doing: the same request would fail the same way.
_HOPELESS = (httpx.UnsupportedProtocol, httpx.LocalProtocolError)


@dataclass(frozen=True, kw_only=True)
class Retries:
    """How patient a client is. attempts=1: every request once.

    Pauses double from `first_pause_s` to `longest_pause_s`, with full jitter. A Retry-After wins over that; one that is longer than
    `longest_told_s` ends the tries, and whoever catches the ProblemError reads from it when to come back.
    """

    attempts: int = 4
    first_pause_s: float = 0.5
    longest_pause_s: float = 8.0
    longest_told_s: float = 30.0

    def pause_s(self, attempt: int, told_s: float | None = None) -> float | None:
        """Seconds until the try that follows `attempt` (the first is 1); None: there is none."""
        if attempt >= self.attempts or (told_s or 0) > self.longest_told_s:
            return None
        if told_s is not None:
            # Not everybody who was told the same at the same instant.
            return told_s + random.uniform(0, min(1.0, told_s / 4))
        return random.uniform(0, min(self.longest_pause_s, self.first_pause_s * 2 ** (attempt - 1)))


def is_passing(answer: httpx.Response) -> bool:
    """Whether the same request may be answered otherwise later: too many requests, or a part of the house or a proxy is away."""
    return answer.status_code in _PASSING and answer.headers.get("X-Should-Retry") != "false"


def is_hopeless(error: httpx.TransportError) -> bool:
    """Whether the request never could be sent."""
    return isinstance(error, _HOPELESS)


def told_s(answer: httpx.Response) -> float | None:
    """Seconds that Retry-After asks for, in either of its forms."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
