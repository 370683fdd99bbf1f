"""Instants as programs outside read them."""

from datetime import UTC, datetime, timedelta, timezone

from policy.instants import rfc3339


def test_an_instant_is_written_in_utc_whatever_its_offset():
    tokyo = datetime(2026, 11, 30, 1, 2, 3, 456789, tzinfo=timezone(timedelta(hours=9)))

    assert rfc3339(tokyo) == "2026-11-29T16:02:03.456789+00:00"
    assert rfc3339(tokyo.astimezone(UTC)) == rfc3339(tokyo)
