"""Write instants as programs outside read them."""

from datetime import UTC, datetime


def rfc3339(at: datetime) -> str:
    """Write an aware instant as RFC 3339 says it, in UTC whatever its offset was."""
    return at.astimezone(UTC).isoformat()
