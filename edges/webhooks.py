"""Make headers, signatures and secrets of webhooks by Standard Webhooks (standardwebhooks.com)."""

import base64
import secrets
from collections.abc import Sequence
from datetime import datetime

from standardwebhooks import Webhook

_SECRET_BYTES = 32


def new_secret() -> str:
    """Make a new secret: `whsec_…`, of 32 random bytes."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def headers(
    message_id: str,
    at: datetime,
    body: str,
    live_secrets: Sequence[str],
    traceparent: str | None = None,
) -> dict[str, str]:
    """Return the headers for `body`: the id, the attempt's time, a signature by each live secret.

    at: aware, in UTC: the library would read the digits of any other zone as UTC.  traceparent: of
    the job, for the receiver to go on with.  Raises ValueError for another zone.
    """
    offset = at.utcoffset()
    if offset is None or offset.total_seconds():
        raise ValueError("the time of a webhook is told in UTC")
    signatures = [Webhook(secret).sign(message_id, at, body) for secret in live_secrets]
    return {
        "Content-Type": "application/json",
        "webhook-id": message_id,
        "webhook-timestamp": str(int(at.timestamp())),
        "webhook-signature": " ".join(signatures),
    } | ({} if traceparent is None else {"traceparent": traceparent})
