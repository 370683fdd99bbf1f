"""Refuse a field of a request, and say what would be accepted. Pure."""

from collections.abc import Sequence
from typing import TypeVar

Number = TypeVar("Number", int, float)


class InvalidParam(Exception):
    """No worker could ever render the field; `accepted` says what would be accepted."""

    def __init__(self, field: str, detail: str, accepted: object = None) -> None:
        super().__init__(f"{field}: {detail}")
        self.field = field
        self.detail = detail
        self.accepted = accepted


def one_of(field: str, value: str, accepted: Sequence[str]) -> str:
    """Return the value if it is one of those that are accepted. Raises InvalidParam."""
    if value not in accepted:
        detail = f"{value[:64]!r} is not offered; accepted: {', '.join(accepted)}"
        raise InvalidParam(field, detail, list(accepted))
    return value


def within(field: str, value: Number, low: Number, high: Number, by: str) -> Number:
    """Return the value if it is in the range, ends included. by: who says so. Raises as above."""
    if not low <= value <= high:
        raise InvalidParam(field, f"must be from {low} to {high} ({by})", {"min": low, "max": high})
    return value
