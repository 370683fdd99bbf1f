"""Have objects deleted from the store that nothing refers to any more."""

import structlog

from app.runtime import Runtime
from edges.broker import BrokerUnavailable
from policy import queues

log = structlog.get_logger(__name__)


def ask_to_tidy(runtime: Runtime) -> None:
    """Ask a results worker to tidy the store now; to be called after commit.

    While the broker is away nothing is asked, and nothing raised: the sweeper finds what is left.
    """
    last_queue = queues.results_queue(runtime.fleet, runtime.fleet.tiers_by_rank[-1])
    try:
        runtime.broker.ask_for(queues.TIDY_STORE, last_queue)
    except BrokerUnavailable as error:
        log.warning("tidy_postponed", reason=str(error))
