"""List every failure code, with whose fault it is and what of it a tenant may read.

Ours: what was asked for is offered, and the same request may do better on another try. The other
failures come from the request itself, or from a model that is gone, and happen at every try.
Details of internal errors are not shown; they are in the attempts table.
"""

from dataclasses import dataclass
from enum import StrEnum


class FailureCode(StrEnum):
    """The values of `jobs.failure_code`."""

    ATTEMPTS_EXHAUSTED = "attempts_exhausted"  # the cap of attempts; the detail has the last error
    UNSUPPORTED = "unsupported"  # the engine cannot render this, on any worker
    MODEL_GONE = "model_gone"  # its model or version was taken out of the catalogue meanwhile
    NO_LONGER_OFFERED = "no_longer_offered"  # so was its size, sampler or adapter
    NOT_FINITE = "not_finite"  # the network produced NaN or infinity
    OUT_OF_MEMORY = "out_of_memory"  # it does not fit into the device's memory, not even alone
    INPUT_GONE = "input_gone"  # a picture it starts from is not in the store
    RUN_DEADLINE = "run_deadline"  # it was not rendered within run_within_s of its first start
    NOT_STORED = "not_stored"  # its pixels were lost again and again before they could be stored
    INTERNAL = "internal"


@dataclass(frozen=True)
class Failure:
    """The handling of a failure code.

    is_ours: it is our fault, not the request's.  is_detail_told: the tenant may read its detail.
    """

    is_ours: bool
    is_detail_told: bool


FAILURES = {
    FailureCode.ATTEMPTS_EXHAUSTED: Failure(is_ours=True, is_detail_told=False),
    FailureCode.UNSUPPORTED: Failure(is_ours=False, is_detail_told=True),
    FailureCode.MODEL_GONE: Failure(is_ours=False, is_detail_told=True),
    FailureCode.NO_LONGER_OFFERED: Failure(is_ours=False, is_detail_told=True),
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
    """Give the detail of a failure as a tenant may read it; None if it is not shown."""
    return detail if _failure(code).is_detail_told else None


def _failure(code: str | None) -> Failure:
    """Find the handling of a code; one that is unknown is not ours, and its detail not shown."""
    try:
        return FAILURES[FailureCode(code or "")]
    except ValueError:
        return Failure(is_ours=False, is_detail_told=False)
