"""Webhooks as Standard Webhooks writes them (standardwebhooks.com): headers, signatures, secrets."""

import base64
import secrets
from collections.abc import Sequence
from datetime import datetime

from standardwebhooks import Webhook

_SECRET_BYTES = 32


def new_secret() -> str:
    """`whsec_…`: 32 random bytes."""
    return "whsec_" + base64.b64encode(secrets.token_bytes(_SECRET_BYTES)).decode()


def headers(
    message_id: str, at: datetime, body: str, live_secrets: Sequence[str]
) -> dict[str, str]:
    """What goes with `body`: the id, the time of this attempt, and a signature by every live secret.

    at: in UTC, and aware of it, for the library would take the figures of any other zone for UTC.
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
    }
