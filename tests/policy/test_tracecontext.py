"""The trace context of a request is taken as the W3C says, or not at all."""

import pytest

from policy import tracecontext

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
VALID = f"00-{TRACE}-00f067aa0ba902b7-01"


def test_valid_context_is_taken_and_names_its_trace():
    assert tracecontext.read(VALID) == VALID
    assert tracecontext.trace_id(VALID) == TRACE


def test_later_version_may_have_more_parts_which_are_left_out():
    assert tracecontext.read(f"01{VALID[2:]}-more-of-it") == f"01{VALID[2:]}"


@pytest.mark.parametrize(
    "header",
    [
        "",
        "nonsense",
        VALID.upper(),
        f"{VALID}-more",
        f"ff{VALID[2:]}",
        f"00-{'0' * 32}-00f067aa0ba902b7-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE[:-1]}-00f067aa0ba902b7-01",
        f" {VALID}",
        f"{VALID}\n",
    ],
)
def test_context_that_is_not_valid_is_as_good_as_none(header):
    assert tracecontext.read(header) is None
