"""Have objects deleted from the store that no row refers to any more."""

import structlog

from app.runtime import Runtime
from edges.broker import BrokerUnavailable
from policy import queues

log = structlog.get_logger(__name__)


def ask_to_tidy(runtime: Runtime) -> None:
    """Ask a results worker to tidy the store now; call it after commit.

    While the broker is away, nothing is sent and nothing is raised: the sweeper deletes them later.
    """
    last_queue = queues.results_queue(runtime.fleet, runtime.fleet.tiers_by_rank[-1])
    try:
        runtime.broker.ask_for(queues.TIDY_STORE, last_queue)
    except BrokerUnavailable as error:
        log.warning("tidy_postponed", reason=str(error))
