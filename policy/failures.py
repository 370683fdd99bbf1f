"""Why jobs fail: every failure code, whose fault it is, and what of it a tenant is told.

Ours: what was asked for is offered, and the same request may do better on another try. The rest is
the request's own: it comes to the same however often it is tried. The details of what went wrong
inside stay inside, in the attempts table.
"""

from dataclasses import dataclass
from enum import StrEnum


class FailureCode(StrEnum):
    """What `jobs.failure_code` may be."""

    ATTEMPTS_EXHAUSTED = "attempts_exhausted"  # the cap of attempts; the detail has the last error
    UNSUPPORTED = "unsupported"  # the engine cannot render this, on any worker
    NOT_FINITE = "not_finite"  # the network produced NaN or infinity
    OUT_OF_MEMORY = "out_of_memory"  # it does not fit into the device's memory, not even alone
    INPUT_GONE = "input_gone"  # a picture it starts from is not in the store
    RUN_DEADLINE = "run_deadline"  # it was not rendered within run_within_s of its first start
    NOT_STORED = "not_stored"  # its pixels were lost again and again before they could be stored
    INTERNAL = "internal"


@dataclass(frozen=True)
class Failure:
    """is_ours: whose fault it is.  is_detail_told: whether its detail leaves the house."""

    is_ours: bool
    is_detail_told: bool


FAILURES = {
    FailureCode.ATTEMPTS_EXHAUSTED: Failure(is_ours=True, is_detail_told=False),
    FailureCode.UNSUPPORTED: Failure(is_ours=False, is_detail_told=True),
    FailureCode.NOT_FINITE: Failure(is_ours=False, is_detail_told=True),
    # Of a size and number of images that the catalogue offers.
    FailureCode.OUT_OF_MEMORY: Failure(is_ours=True, is_detail_told=True),
    # A file that a job under way starts from cannot be erased: the store has lost it.
    FailureCode.INPUT_GONE: Failure(is_ours=True, is_detail_told=True),
    FailureCode.RUN_DEADLINE: Failure(is_ours=True, is_detail_told=True),
    FailureCode.NOT_STORED: Failure(is_ours=True, is_detail_told=True),
    FailureCode.INTERNAL: Failure(is_ours=True, is_detail_told=False),
}


def is_our_fault(code: str | None) -> bool:
    """Check whether another try of the same request may do better."""
    return _failure(code).is_ours


def told_detail(code: str | None, detail: str | None) -> str | None:
    """Give the detail of a failure as a tenant may read it; None if it stays inside."""
    return detail if _failure(code).is_detail_told else None


def _failure(code: str | None) -> Failure:
    """Find what is known of a code; of one that is not known nothing is told, and it is not ours."""
    try:
        return FAILURES[FailureCode(code or "")]
    except ValueError:
        return Failure(is_ours=False, is_detail_told=False)
