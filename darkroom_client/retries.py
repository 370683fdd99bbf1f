"""Decide when to try again, and after how long. The caller does the waiting.

Every request of this client may be repeated. Reads and cancels are harmless, uploads are
content-addressed, and requests that make jobs carry the same Idempotency-Key in all their tries.
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
    """The rules by which a client repeats requests. attempts=1: every request is sent once.

    Pauses double from `initial_backoff_s` to `max_backoff_s`, with full jitter. A Retry-After takes
    precedence. After one that is longer than `max_retry_after_s` the client gives up; the
    ProblemError then says when to try again.
    """

    attempts: int = 4
    initial_backoff_s: float = 0.5
    max_backoff_s: float = 8.0
    max_retry_after_s: float = 30.0

    def pause_s(self, attempt: int, retry_after_s: float | None = None) -> float | None:
        """Return the seconds to wait after try number `attempt` (the first is 1); None: give up.

        retry_after_s: what the answer's Retry-After asks for, if it does.
        """
        if attempt >= self.attempts or (retry_after_s or 0) > self.max_retry_after_s:
            return None
        if retry_after_s is not None:
            # Jitter: clients that were told the same must not all return at once.
            return retry_after_s + random.uniform(0, min(1.0, retry_after_s / 4))
        return random.uniform(
            0, min(self.max_backoff_s, self.initial_backoff_s * 2 ** (attempt - 1))
        )


def is_passing(answer: httpx.Response) -> bool:
    """Tell whether the same request may succeed later.

    That is so for too many requests, and while a part of Darkroom or a proxy is down.
    """
    return answer.status_code in _PASSING and answer.headers.get("X-Should-Retry") != "false"


def is_hopeless(error: httpx.TransportError) -> bool:
    """Tell whether the request could never be sent, so that trying again is useless."""
    return isinstance(error, _HOPELESS)


def retry_after_s(answer: httpx.Response) -> float | None:
    """Return the seconds that Retry-After asks for, in either of its forms."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        at = email.utils.parsedate_to_datetime(text)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())
